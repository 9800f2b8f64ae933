"""A plain run of Megatron-Bridge: quantized from its checkpoint, and the start of training."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

import megatron_quant as mq
from tests.dist import checkpoints, saved
from tests.dist.pool import Ranks
from tests.dist.test_live_models import weights

pytestmark = pytest.mark.skipif(not find_spec("megatron.bridge"), reason="make test-clients")
SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 128}
DELTA_NETS = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4}
DELTA_NETS["full_attention_interval"] = 2  # which Bridge 0.3 asks for
RECIPE = "w4a16_nvfp4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    return checkpoints.save("qwen3_moe", path, **SIZES, norm_topk_prob=True)


def train(source: Path, run: Path, hf: Path) -> None:
    """Two steps without quantizers, then Bridge's own export of the weights."""
    from megatron.bridge import AutoBridge

    from tests.clients import bridge

    provider = bridge.provider(source, 2, 2)
    model = bridge.pretrain(provider, None, run, 2, save_interval=2)
    provider.initialize_model_parallel(seed=1)  # its loop ends them
    AutoBridge.from_hf_pretrained(str(source)).save_hf_pretrained(model, str(hf))


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    ranks(2, train, source, folder / "run", folder / "hf")
    return folder


def quantize(source: Path, run: Path | None, out: Path) -> None:
    saved.quantize(
        hf_model_id=str(source),
        megatron_load_path=run,
        export_dir=out,
        tp=1,
        ep=2,
        export_quant_cfg=RECIPE,
        weight_only=True,
    )


def test_its_checkpoint_exports_as_its_own_hugging_face_export(
    plain: Path, source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(2, quantize, plain / "hf", plain / "run", tmp_path / "from_run")
    ranks(2, quantize, plain / "hf", None, tmp_path / "from_hf")
    assert weights(tmp_path / "from_run") == weights(tmp_path / "from_hf")


def test_delta_nets_of_its_checkpoint(tmp_path: Path, ranks: Ranks) -> None:
    """Parts of in_proj under keys of their own, all in bf16, and a norm that is stored less one."""
    source = checkpoints.save("qwen3_next", tmp_path / "source", **DELTA_NETS)
    ranks(2, train, source, tmp_path / "run", tmp_path / "hf")
    ranks(2, quantize, tmp_path / "hf", tmp_path / "run", tmp_path / "from_run")
    ranks(2, quantize, tmp_path / "hf", None, tmp_path / "from_hf")
    assert weights(tmp_path / "from_run") == weights(tmp_path / "from_hf")


def start(source: Path, plain: Path, run: Path, out: Path, steps: int) -> bool:
    """A script of `pretrained_checkpoint`, for its first start and a requeue."""
    from megatron_quant.mcore.training import QuantCallback, prepare
    from tests.clients import bridge

    provider = bridge.provider(source, 1, 2)
    hook = partial(prepare, recipe=RECIPE, checkpoint=plain, hf_model=str(source))
    provider.register_pre_wrap_hook(partial(hook, checkpoint_if_present=run))
    callback = QuantCallback(log=lambda line: None)
    settings = {"save_interval": 2, "dist_ckpt_optim_fully_reshardable": True}
    model = bridge.pretrain(
        provider, callback, run, steps, pretrained_checkpoint=str(plain), finetune=True, **settings
    )
    mq.export(model, out)
    return bool(mq.quantized(model).stored)


def test_training_starts_from_it(plain: Path, source: Path, tmp_path: Path, ranks: Ranks) -> None:
    run = tmp_path / "run"
    first = ranks(2, start, source, plain / "run", run, tmp_path / "first", 2)
    again = ranks(2, start, source, plain / "run", run, tmp_path / "again", 4)
    assert (first, again) == ([False, False], [True, True])
    assert weights(tmp_path / "first") != weights(tmp_path / "again")
