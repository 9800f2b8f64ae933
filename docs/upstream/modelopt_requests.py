"""ModelOpt: it imports requests, which it does not declare.

python docs/upstream/modelopt_requests.py
"""

import ast
import importlib.util
from importlib import metadata
from pathlib import Path

spec = importlib.util.find_spec("modelopt")
path = Path(spec.submodule_search_locations[0]) / "torch/utils/dataset_utils.py"
body = ast.parse(path.read_text(encoding="utf-8")).body
imported = any(isinstance(node, ast.Import) and node.names[0].name == "requests" for node in body)
declared = [r for r in metadata.requires("nvidia-modelopt") or () if r.startswith("requests")]
plain = [r for r in declared if "extra ==" not in r]
print("nvidia-modelopt", metadata.version("nvidia-modelopt"))
print("expected: a requirement on requests, which modelopt.torch.utils imports at its top")
print(f"found:    imported at the top: {imported}; requirements: {declared}")
print("FAULT" if imported and not plain else "no fault")
raise SystemExit(0 if imported and not plain else 1)
