"""Execute notebooks and keep their outputs; every cell must run.

    python scripts/notebooks.py FOLDER NOTEBOOK... [--set NAME=VALUE]

The notebooks run in FOLDER, which has the runs that they read. `--set` changes a variable in the cell tagged
"parameters"; the outputs are then not written back.
"""

import argparse
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def executed(path: Path, folder: Path, settings: list[str]) -> nbformat.NotebookNode:
    """The notebook with the outputs of this run."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = "\n".join([cell.source, *settings])
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
        for output in cell.get("outputs", ()):
            if "text" in output:  # removes paths of this machine
                output.text = re.sub(re.escape(str(folder.resolve())) + "/?", "", output.text)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    asked = parser.parse_args()
    for path in asked.notebooks:
        began = time.perf_counter()
        notebook = executed(path, asked.folder, asked.settings)
        if not asked.settings:
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
