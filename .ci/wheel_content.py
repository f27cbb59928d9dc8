"""Refuses a wheel that lacks a file of the package, or carries what is no part of it."""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
names = set(zipfile.ZipFile(sys.argv[1]).namelist())
expected = {str(path.relative_to(ROOT)) for path in (ROOT / "gpu_ot").rglob("*.py") if "kernels" not in path.parts}
expected |= {f"gpu_ot/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} | {"gpu_ot/py.typed"}
missing, foreign = expected - names, {name for name in names if not name.startswith("gpu_ot")}
if missing or foreign:
    sys.exit(f"{sys.argv[1]}: missing {sorted(missing)}, no part of it {sorted(foreign)}")
print(f"{Path(sys.argv[1]).name}: {len(names)} files, nothing missing and nothing else")
