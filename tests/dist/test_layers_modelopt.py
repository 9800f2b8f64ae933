"""ModelOpt's own verbs on a model with our grouped linears."""

import pytest
import torch

from tests.dist.pool import Ranks

FC1, FC2 = "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"


def _classes() -> None:
    import transformer_engine.pytorch as te_pytorch
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    from megatron_quant.layers import register
    from megatron_quant.layers.grouped import QuantGroupedLinear

    register()
    for base in (TEColumnParallelGroupedLinear, TERowParallelGroupedLinear):
        ours = QuantModuleRegistry[base]
        assert ours.__name__ == f"Quant{base.__name__}"
        assert issubclass(ours, base)
        assert issubclass(ours, te_pytorch.GroupedLinear)
        assert issubclass(ours, QuantGroupedLinear)


def _entries() -> dict[str, tuple[type, str] | None]:
    """What ModelOpt converts each of the classes to that we replace, and by which name."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from modelopt.torch.quantization.nn import QuantModuleRegistry as registry

    bases = (
        te.TEColumnParallelGroupedLinear,
        te.TERowParallelGroupedLinear,
        te.TEDotProductAttention,
        TEGroupedMLP,
        MLP,
    )
    return {
        base.__name__: (registry[base].__bases__[0], registry.get_key(base))
        if base in registry
        else None
        for base in bases
    }


def _registered_and_not() -> None:
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend

    import megatron_quant.layers.install  # noqa: F401  (attach is there, and has not been called)
    from megatron_quant.layers import register, unregister

    theirs = _entries()
    assert not any("megatron_quant" in entry[1] for entry in theirs.values() if entry)
    assert not is_registered_quant_backend("megatron_quant")
    unregister()
    assert _entries() == theirs
    register()
    ours = _entries()
    assert {name for name, entry in ours.items() if entry is None} == {"MLP"}
    assert all(entry[1] == f"megatron_quant_{name}" for name, entry in ours.items() if entry)
    assert is_registered_quant_backend("megatron_quant")
    register()
    assert _entries() == ours
    unregister()
    assert _entries() == theirs and theirs["MLP"] is not None
    assert not is_registered_quant_backend("megatron_quant")
    register()
    assert _entries().keys() == ours.keys() and _entries()["MLP"] is None


def test_registering_is_a_call_and_can_be_undone(ranks: Ranks) -> None:
    ranks(1, _registered_and_not)


def _quantize(tp: int, ep: int, etp: int, config: object) -> dict[str, torch.Tensor]:
    """The amaxes after mtq.quantize, whose forward is the tiny model's batch."""
    import contextlib
    import io

    import modelopt.torch.quantization as mtq

    from megatron_quant.layers import QuantGroupedLinear, register
    from tests.dist import tiny

    register()
    tiny.start(tp, ep, etp)
    built = tiny.model(tiny.config(4))
    before = tiny.logits(built)
    config = getattr(mtq, config) if isinstance(config, str) else config
    mtq.quantize(built, config, tiny.logits)
    after = tiny.logits(built)
    assert 0 < (before - after).norm() / before.norm() < 0.5
    experts = built.decoder.layers[0].mlp.experts
    assert type(experts.linear_fc1).__name__ == "QuantTEColumnParallelGroupedLinear"
    assert type(experts.linear_fc2).__name__ == "QuantTERowParallelGroupedLinear"
    assert isinstance(experts.linear_fc1, QuantGroupedLinear)
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary):
        mtq.print_quant_summary(built)
    assert f"decoder.layers.1.{FC1}.weight_quantizer " in summary.getvalue()
    assert f"decoder.layers.1.{FC2}.input_quantizer " in summary.getvalue()
    return {k: v for k, v in built.state_dict().items() if k.endswith("_amax")}


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> dict[str, torch.Tensor]:
    return ranks(1, _quantize, 1, 1, 1, "FP8_DEFAULT_CFG")[0]


def test_the_classes_are_subclasses_and_registered(ranks: Ranks) -> None:
    ranks(1, _classes)


def test_quantize_gives_the_names_that_users_know(one_rank: dict[str, torch.Tensor]) -> None:
    for layer in (0, 1):
        for linear in (FC1, FC2):
            name = f"decoder.layers.{layer}.{linear}"
            assert one_rank[f"{name}.weight_quantizer._amax"].shape == ()
            assert one_rank[f"{name}.input_quantizer._amax"].shape == ()
    assert len(one_rank) == 2 * 4 * 2  # weight and input of four linears in two layers


@pytest.mark.parametrize(
    ("world", "tp", "ep", "etp"),
    [pytest.param(2, 1, 2, 1, id="ep2"), pytest.param(4, 2, 2, 2, id="tp2-ep2-etp2")],
)
def test_shared_amaxes_are_of_all_experts(
    ranks: Ranks, one_rank: dict[str, torch.Tensor], world: int, tp: int, ep: int, etp: int
) -> None:
    for amaxes in ranks(world, _quantize, tp, ep, etp, "FP8_DEFAULT_CFG"):
        assert amaxes.keys() == one_rank.keys()
        for name, value in one_rank.items():
            tolerance = 0.0 if "weight" in name else 1e-4
            torch.testing.assert_close(amaxes[name], value, rtol=tolerance, atol=0, msg=name)


def _per_expert(ep: int) -> list[torch.Tensor]:
    """Largest magnitude of each local expert of the first layer, by ModelOpt and by hand."""
    import modelopt.torch.quantization as mtq

    from megatron_quant.formats import get_format
    from megatron_quant.layers import QuantGroupedLinear, register
    from megatron_quant.layers.backend import quantizer_attributes
    from tests.dist import tiny

    register()
    tiny.start(1, ep)
    built = tiny.model(tiny.config(4))
    attributes = quantizer_attributes(get_format("fp8"), axis=0)
    attributes.pop("enable")
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*.experts.*weight_quantizer", "cfg": attributes},
    ]
    mtq.quantize(built, {"quant_cfg": rules, "algorithm": "max"})
    layer = built.decoder.layers[0].mlp.experts.linear_fc1
    assert isinstance(layer, QuantGroupedLinear) and layer.per_expert
    seen: list[int] = []
    hook = layer.weight_quantizer.register_forward_pre_hook(lambda _, x: seen.append(x[0].numel()))
    for weight, quantizer in layer.iter_weights_for_calibration():
        quantizer(weight)
    hook.remove()
    # Each element once: a stack for every expert would be as many times more as there are experts.
    assert sum(seen) == sum(w.numel() for w in layer.weights())
    found = layer.weight_quantizer.amax
    assert found.shape == (layer.num_gemms, 1, 1)
    want = torch.stack([w.abs().max() for w in layer.weights()])
    assert torch.equal(found.flatten(), want)
    return want.tolist()


def test_per_expert_amaxes_through_modelopts_calibration(ranks: Ranks) -> None:
    (one,) = ranks(1, _per_expert, 1)
    first, second = ranks(2, _per_expert, 2)
    assert len(set(one)) == 4
    assert first + second == one


def _per_expert_of_each_format() -> None:
    """As above for formats with blocks, which ModelOpt's config refuses beside an axis."""
    import modelopt.torch.quantization as mtq

    from megatron_quant.formats import get_format
    from tests.dist import grouped, tiny

    tiny.start()
    for fmt in (get_format("nvfp4"), get_format("int4", 32)):
        layer = grouped.quantized("row", 3, fmt, 0)
        want = layer.weight_quantizer.amax
        layer.weight_quantizer.reset_amax()
        mtq.calibrate(layer, "max")
        assert torch.equal(layer.weight_quantizer.amax, want)


def test_per_expert_amaxes_of_block_formats(ranks: Ranks) -> None:
    ranks(1, _per_expert_of_each_format)


def _as_modelopt_does(config_name: str) -> None:
    """A weight config of ModelOpt's own does to each expert what it does to a plain linear."""
    import copy

    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    from tests.dist import grouped, tiny

    tiny.start()
    entries = mtq.config.normalize_quant_cfg_list(getattr(mtq, config_name)["quant_cfg"])
    weights = [e for e in entries if e.quantizer_name == "*weight_quantizer"]
    cfg = weights[-1].cfg
    layer = QuantModuleRegistry.convert(grouped.plain("column", 3))
    layer.input_quantizer.disable()
    layer.weight_quantizer.set_from_attribute_config(cfg)
    mtq.calibrate(layer, "max")
    want = []
    for weight in layer.weights():
        linear = torch.nn.Linear(grouped.K, grouped.N, bias=False)
        linear.weight.data.copy_(weight.detach())
        linear = QuantModuleRegistry.convert(linear)
        linear.input_quantizer.disable()
        linear.weight_quantizer.set_from_attribute_config(copy.deepcopy(cfg))
        mtq.calibrate(linear, "max")
        want.append(linear.weight_quantizer(linear.weight))
    x = grouped.inputs(6)
    assert torch.equal(layer(x, [2, 0, 4])[0], grouped.expected(x, want, [2, 0, 4]))


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_modelopts_own_formats_work_as_on_a_plain_linear(ranks: Ranks, config: str) -> None:
    ranks(1, _as_modelopt_does, config)
