"""Download the official CIFAR-10 archive, verified by its checksum."""

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cnnmpi.data.dataset import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
TIMEOUT = (10, 30)  # seconds to connect, and between two pieces


class DownloadError(DataError):
    """The archive could not be had from the network."""


def download_cifar10(folder: Path) -> Path:
    """Return the path of the archive, downloaded to ``folder``. On failure nothing is left there: DownloadError."""
    import pooch  # here, because it is slow to import and rarely needed

    pooch.get_logger().setLevel("WARNING")  # the progress bar says enough
    name = URL.rsplit("/", 1)[1]
    try:
        with ProgressBar(f"downloading {name}") as bar:
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=TIMEOUT)
            return Path(pooch.retrieve(URL, f"sha256:{SHA256}", fname=name, path=folder, downloader=downloader))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        text = " ".join(str(error).split())
        reason = "no connection" if "Max retries" in text else text[:200]
        raise DownloadError(
            f"{URL} could not be downloaded ({type(error).__name__}: {reason}); "
            f"fetch it on a machine with network access and put it in {folder}"
        ) from error


class ProgressBar:
    """What pooch asks of a progress bar (``total``, ``update``, ``reset``, ``close``), shown by rich on stderr."""

    def __init__(self, title: str) -> None:
        columns = (
            TextColumn(title, markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=None, visible=False)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def total(self) -> float | None:
        """Bytes to come; pooch sets it when the server has answered."""
        return self._progress.tasks[0].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None, visible=True)

    def update(self, count: int) -> None:
        """Count further bytes."""
        self._progress.advance(self._task, count)

    def reset(self) -> None:
        """Start again at 0 bytes."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
