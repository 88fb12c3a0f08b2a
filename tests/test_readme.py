"""The README's Python runs as it stands there."""

import re
from pathlib import Path


def test_python_blocks_run_in_order():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})
