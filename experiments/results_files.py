"""What a benchmark leaves behind: its figures as JSON and as a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console


def write_results(stem: Path, values: Any, draw: Callable[[Path], None], console: Console) -> None:
    """Writes `stem`.json and `stem`.png, and says so.

    Args:
        stem: path without a suffix, in a folder that exists.
        values: what JSON can hold.
        draw: writes the picture.
        console: where to say it.
    """
    json_path, figure_path = stem.with_suffix(".json"), stem.with_suffix(".png")
    json_path.write_text(json.dumps(values, indent=2) + "\n")
    draw(figure_path)
    console.print(f"wrote {json_path} and {figure_path}", soft_wrap=True)
