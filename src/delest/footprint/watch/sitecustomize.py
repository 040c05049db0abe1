"""What every Python that starts under `delest measure --` loads first: it waits for the script to import torch.

Python imports `sitecustomize` before the script (https://docs.python.org/3/library/site.html). Nothing else is loaded here until
torch has been, and nothing of delest: the script may run in an environment that lacks it. The environment's own
`sitecustomize` then has its turn as ever.
"""

# What a bare interpreter has loaded already, and nothing else: no typing, no importlib of the library's.
import _frozen_importlib
import _frozen_importlib_external
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_REPORTS = "DELEST_WATCH_REPORTS"  # the folder that reports are written to


class _WhenTorchIsImported:
    """A finder on `sys.meta_path` that lets the others find torch and begins to watch once it has been loaded."""

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None and hasattr(loader, "exec_module"):
            load = loader.exec_module

            def exec_module(module: "Any") -> None:
                del loader.exec_module  # the loader that torch keeps is as it would have been
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _begin_to_watch()

            loader.exec_module = exec_module
        return spec


def _begin_to_watch() -> None:
    sys.path.insert(0, _HERE)
    try:
        import delest_watching

        delest_watching.begin(os.environ[_REPORTS], os.environ.get("DELEST_WATCH_TIMELINE") == "1")
    except Exception as error:
        _tell(f"the script could not be watched: {type(error).__name__}: {error}")
    finally:
        if _HERE in sys.path:
            sys.path.remove(_HERE)


def _tell(note: str) -> None:
    """Leave a note where no report can be written."""
    import json

    try:
        with open(os.path.join(os.environ[_REPORTS], f"{os.getpid()}-notes.json"), "w") as file:
            json.dump({"steps": 0, "notes": [note]}, file)
    except OSError:
        return  # the folder went with the command that made it: nobody is there to read


def _is_worker() -> bool:
    """Whether `multiprocessing` started this process: such a one works for the script and is not it."""
    words = getattr(sys, "orig_argv", [])
    return "--multiprocessing-fork" in words or any(word.startswith("from multiprocessing.") for word in words)


def _load_the_other_one() -> None:
    """Load the `sitecustomize` that this one stands before."""
    spec = _frozen_importlib_external.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = _frozen_importlib.module_from_spec(spec)
        spec.loader.exec_module(module)


sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _HERE]
if _REPORTS in os.environ and not _is_worker():
    sys.meta_path.insert(0, _WhenTorchIsImported())
_load_the_other_one()
