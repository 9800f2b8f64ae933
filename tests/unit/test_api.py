"""The front door: its names, its signatures, and what importing it loads."""

import ast
import subprocess
import sys
from pathlib import Path

import megatron_quant as mq

ROOT = Path(mq.__file__).parent
SIGNATURES = {
    "convert": "checkpoint, out, *, format, serve, write, groups, phases",
    "choices": "",
    "evaluate": "out, text, *, against, seq_length, max_tokens, dtype, tokenizer, "
    "trust_remote_code, native, report, log_to, progress",
    "export": "model, out, *, format, dtype, serve, write",
    "export_tensors": "model, *, format, dtype, ranks, max_bytes",
    "find_recipe": "model, auto, *, hf_model, parallel, calibration, loss, expert_scales, dtype, "
    "format, serve, groups, phases",
    "load_recipe": "name_or_path",
    "plan": "source, recipe, *, parallel, format, serve, write, **flags",
    "plan_search": "source, auto, *, parallel, calibration, format, serve, write, **flags",
    "quantize": "model, recipe, forward_loop, *, hf_model, expert_scales, calibration, groups",
    "quantize_checkpoint": "source, recipe, out, *, parallel, calibration, format, serve, write, "
    "auto, phases, **flags",
    "quantized": "model",
    "search_again": "directory, bits, *, formats, cost, recipe, report, log_to",
    "sensitivity": "source, formats, *, calibration, dtype, report, log_to, groups, phases",
    "restore": "model, directory, *, hf_model, groups",
    "save": "model, directory",
    "stream": "source, recipe, out, *, calibration, format, serve, write, auto, groups, phases, "
    "**flags",
    "update": "model",
    "use_cpu": "",
    "verify": "out, *, against, digests, strict, groups",
}
FIELDS = {
    "Parallel": "tp, pp, cp, ep, etp, num_virtual_stages_per_pipeline_rank, "
    "num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage",
    "Calibration": "dataset, size, seq_length, batch_size, cold_experts, act_percentile, "
    "tokenizer, trust_remote_code, save, load, keep_hessians, memory, experts, sequential",
    "Write": "overwrite, resume, max_shard_size, io_threads, fsync, verify",
    "Serve": "engine, tp",
    "AutoQuantize": (
        "bits, formats, method, score_size, checkpoint, recipe, cost, keep, head, context_length"
    ),
}
RESULTS = {
    *("Choices", "ExportPlan", "Exported", "Found", "Job", "Outcome", "Report", "Rewritten"),
    *("PlannedSearch", "Sensitivity", "StoredTensor", "Streamed"),
}
"""Types of what functions return."""


def definitions() -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """What the front door's names are, found in the sources through the stubs of the faces."""
    found = {}
    for name in mq.__all__:
        file, wanted = ROOT / "__init__.pyi", name
        while file.suffix == ".pyi":
            (line,) = [
                node
                for node in ast.parse(file.read_text()).body
                if isinstance(node, ast.ImportFrom) and wanted in [a.name for a in node.names]
            ]
            path = file.parent.joinpath(*(line.module or "").split("."))
            file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path
            file = file if file.suffix else file / "__init__.pyi"
        (found[name],) = [
            node
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
    return found


def spelled(arguments: ast.arguments) -> str:
    names = [a.arg for a in arguments.args]
    if arguments.kwonlyargs:
        names += ["*", *(a.arg for a in arguments.kwonlyargs)]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return ", ".join(names)


def test_names_and_signatures() -> None:
    found = definitions()
    functions = {n: spelled(d.args) for n, d in found.items() if isinstance(d, ast.FunctionDef)}
    assert functions == SIGNATURES
    classes = {n: d for n, d in found.items() if isinstance(d, ast.ClassDef)}
    assert set(classes) == {*FIELDS, "Groups", "QuantError", "Quantized", "Recipe", *RESULTS}
    for name, fields in FIELDS.items():
        lines = [n for n in classes[name].body if isinstance(n, ast.AnnAssign)]
        assert ", ".join(ast.unparse(line.target) for line in lines) == fields


def test_every_function_says_what_it_does() -> None:
    for name, node in definitions().items():
        assert ast.get_docstring(node), name


def test_importing_it_loads_next_to_nothing() -> None:
    code = """
import sys
before = set(sys.modules)
import megatron_quant as mq
mq.Parallel(tp=2), mq.Write(), mq.Serve(), mq.Calibration(), mq.QuantError
roots = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"torch", "numpy", "megatron", "transformer_engine", "modelopt", "transformers", "rich"}
print(sorted(roots & heavy), len([n for n in sys.modules if n.startswith("megatron_quant")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, count = done.stdout.rsplit(maxsplit=1)
    assert loaded == "[]"
    assert int(count) < 8
