"""Runs the Python blocks of a page with the package that is installed."""

import re
import sys
from pathlib import Path

import gpu_ot

assert "site-packages" in gpu_ot.__file__, gpu_ot.__file__
blocks = re.findall(r"^```python\n(.*?)^```", Path(sys.argv[1]).read_text(), re.M | re.S)
for code in blocks:
    exec(compile(code, sys.argv[1], "exec"), {"__name__": "readme"})
print(f"{len(blocks)} blocks run with gpu_ot {gpu_ot.__version__}")
