"""Train a small Qwen3-MoE on this host's own Python sources: a real checkpoint, made offline.

It stands in for a large model in the demo and in the tests. It has the same architecture, a
tokenizer, learned weights with learned outliers, and experts that the router uses unevenly.
Training takes about four minutes on two CPU cores.

    python examples/make_small_moe.py --output-dir out/small-moe

writes the Hugging Face checkpoint and, beside it, two texts that the model has not seen:
heldout.txt to measure on and calibration.txt to calibrate with. Run again, it keeps what is there
if script, settings and sources are the same.
"""

import argparse
import hashlib
import os
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Threads that spin while they wait are several times slower if other work shares the cores.
# torch reads this once, when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_quant.evaluation.metrics import NOTHING, nll_and_kl, windows

EOS = "<|endoftext|>"
EXCERPT = 2000
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Texts:
    """The texts to train on, to measure on and to calibrate with: disjoint sets of source files."""

    train: list[str]
    heldout: str
    calibration: str


def source_files() -> list[Path]:
    """List the standard library's modules in an order that does not depend on the file system."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED]
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def excerpt(path: Path) -> str:
    """Return the middle of a file: many short pieces make a more even text than few long files."""
    text = read(path)
    start = max(0, (len(text) - EXCERPT) // 2)
    return text[start : start + EXCERPT]


def take(files: Iterator[Path], piece: Callable[[Path], str], characters: int) -> list[str]:
    """Take a piece of each file until there are ``characters``, or no more files."""
    texts: list[str] = []
    filled = 0
    while filled < characters and (path := next(files, None)):
        texts.append(piece(path))
        filled += len(texts[-1])
    return texts


def read_texts(args: argparse.Namespace) -> Texts:
    files = source_files()
    random.Random(args.seed).shuffle(files)
    rest = iter(files)
    heldout, calibration = (
        "\n".join(take(rest, excerpt, size))
        for size in (args.heldout_chars, args.calibration_chars)
    )
    return Texts(take(rest, read, args.train_chars), heldout, calibration)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text has ids, and ids give back the same text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def build_model(args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    torch.manual_seed(args.seed)
    config = Qwen3MoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.moe_intermediate_size,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=4096,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # one product for all experts: 1.7x the tokens
    return model


def batches(ids: torch.Tensor, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield random windows [batch, seq] of one long stream of ids, equal for equal seeds."""
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(args.seq_length)
    while True:
        starts = torch.randint(
            len(ids) - args.seq_length, (args.batch_size, 1), generator=generator
        )
        yield ids[starts + offsets]


def imbalance(model: Qwen3MoeForCausalLM, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Sum the Switch Transformer's balance loss over layers; it keeps every expert in use.

    transformers' own total treats all layers as one, so an expert may be idle in a layer.
    """
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    per_layer = [load_balancing_loss_func((r,), experts, top_k) for r in router_logits]
    return torch.stack(per_layer).sum()


def train(model: Qwen3MoeForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.monotonic()
    losses: list[float] = []
    for step, batch in zip(range(1, args.steps + 1), batches(ids, args), strict=False):
        out = model(batch, output_router_logits=True)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        (loss + args.balance * imbalance(model, out.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % args.log_every == 0 or step == args.steps:
            seconds = time.monotonic() - started
            mean = sum(losses) / len(losses)
            print(f"step {step:4d}/{args.steps}  mean loss {mean:.3f}  {seconds:.0f} s", flush=True)
            losses.clear()


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, ids: list[int], seq_length: int) -> float:
    """Return the perplexity over non-overlapping windows."""
    total = NOTHING
    for window in windows(ids, seq_length):
        total += nll_and_kl(model(window[None, :-1]).logits[0], None, window[1:])
    return total.perplexity


def save(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Texts,
    args: argparse.Namespace,
) -> None:
    """Save the bf16 weights, the tokenizer and the two texts."""
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    args.heldout.write_text(texts.heldout, encoding="utf-8")
    args.calibration.write_text(texts.calibration, encoding="utf-8")


def digest(texts: Texts, args: argparse.Namespace) -> str:
    """Digest of all that the checkpoint follows from: this script, its settings, its text."""
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    held = hashlib.sha256(Path(__file__).read_bytes())
    held.update(repr((sorted(settings.items()), texts)).encode())
    return held.hexdigest()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, help="default: heldout.txt beside the output")
    parser.add_argument("--calibration", type=Path, help="default: calibration.txt beside it")
    for flag, default in {
        "steps": 800,
        "seed": 0,
        "threads": 2,
        "batch-size": 8,
        "seq-length": 128,
        "vocab-size": 4096,
        "hidden-size": 256,
        "layers": 4,
        "heads": 8,
        "kv-heads": 4,
        "head-dim": 64,
        "experts": 16,
        "top-k": 2,
        "moe-intermediate-size": 256,
        "train-chars": 4_000_000,
        "heldout-chars": 60_000,
        "calibration-chars": 240_000,
        "log-every": 40,
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=" ")
    parser.add_argument("--lr", type=float, default=3e-3, help=" ")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    args = parser.parse_args(argv)
    args.heldout = args.heldout or args.output_dir.absolute().parent / "heldout.txt"
    args.calibration = args.calibration or args.output_dir.absolute().parent / "calibration.txt"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    texts = read_texts(args)
    # Beside the checkpoint, since exports carry what lies in its folder.
    made_from = args.output_dir.absolute().with_name(args.output_dir.name + ".made_from")
    wanted = digest(texts, args)
    if made_from.is_file() and made_from.read_text(encoding="utf-8") == wanted:
        print(f"kept {args.output_dir}: script, settings and sources are those it was made from")
        return
    made_from.unlink(missing_ok=True)
    tokenizer = train_tokenizer(texts.train, args.vocab_size)
    ids = torch.tensor([i for t in texts.train for i in tokenizer.encode(t + EOS)])
    model = build_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(ids)} tokens of text", flush=True)
    train(model, ids, args)
    model.eval()
    held = tokenizer.encode(texts.heldout)
    print(f"held-out perplexity {measure(model, held, args.seq_length):.2f}, {len(held)} tokens")
    save(model, tokenizer, texts, args)
    made_from.write_text(wanted, encoding="utf-8")
    print(f"saved {args.output_dir}, {args.heldout}, {args.calibration}")


if __name__ == "__main__":
    main()
