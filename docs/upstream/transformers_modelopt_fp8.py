"""transformers: an fp8 checkpoint of ModelOpt loads with its scales dropped, and a warning only.

python docs/upstream/transformers_modelopt_fp8.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity_error()
folder = Path(tempfile.mkdtemp())
config = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.2,
)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(folder)
ids = torch.arange(16)[None]
with torch.no_grad():
    plain = model(ids).logits.float()

tensors = load_file(folder / "model.safetensors")
for name in [n for n in tensors if n.endswith("_proj.weight")]:
    scale = tensors[name].abs().max().float() / 448
    tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = scale
    tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
settings = json.loads((folder / "config.json").read_text())
settings["quantization_config"] = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt", "version": "0.47.0"},
}
(folder / "config.json").write_text(json.dumps(settings))

try:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        error = float((loaded(ids).logits.float() - plain).norm() / plain.norm())
    text, fault = f"loaded; logits are off by {error:.2f} of their norm", error > 0.5
except Exception as e:
    text, fault = f"{type(e).__name__}: {str(e).splitlines()[0]}", False
print("transformers", transformers.__version__)
print("expected: scaled weights (about 0.03 off), or an error")
print(f"found:    {text}")
print("FAULT" if fault else "no fault")
sys.exit(0 if fault else 1)
