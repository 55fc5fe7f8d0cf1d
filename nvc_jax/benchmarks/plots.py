"""What the plots of benchmarks have in common."""

from pathlib import Path

from nvc_jax.errors import NvcError


def check_plot(path: str) -> None:
    """Raises NvcError if no plot could be drawn into a file of this name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NvcError("--plot needs matplotlib: pip install matplotlib") from None
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known:
        raise NvcError(f"{path}: plots are files of the kinds {', '.join(sorted(known))}")
    if not Path(path).absolute().parent.is_dir():
        raise NvcError(f"{path}: there is no such folder")
