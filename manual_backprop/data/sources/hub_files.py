"""Downloads the files of a dataset on the hub so that an interrupted download resumes in the middle of a file.

`huggingface_hub` restarts a file in each process. This module downloads into a partial file in that library's cache and
renames it to where the library looks. If it cannot (no network, an unknown kind of address), the library downloads.
"""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...common.digests import file_digest
from ...common.errors import Interrupted

log = logging.getLogger(__name__)

_ADDRESS = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")  # the entity tag of every large file


def fetch_files(builder: Any, say: Callable[[str], None]) -> None:
    """Download the files that the builder needs, unless it has prepared its rows already."""
    from huggingface_hub.utils import httpx

    if Path(builder.cache_dir).exists():
        return
    try:
        files = [(*named, _described(*named)) for named in _files(builder)]
        missing = [there.size - begin for *named, there in files if (begin := _begun(named[0], there)) is not None]
        if missing:
            count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
            say(f"to download: {sum(missing) / 1e6:,.1f} MB ({sum(missing):,} bytes) in {count}")
        for repository, revision, path, there in files:
            _fetch(repository, revision, path, there, say)
    except (Interrupted, httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError):  # the library would restart
        raise
    except Exception as error:  # the library meets the same failure and raises its own exception
        log.info("left to the library: %s: %s", type(error).__name__, error)


def _files(builder: Any) -> Iterator[tuple[str, str, str]]:
    for addresses in (builder.config.data_files or {}).values():
        for address in addresses:
            if (found := _ADDRESS.fullmatch(str(address))) is not None:
                yield found["repository"], found["revision"], found["path"]


def _described(repository: str, revision: str, path: str) -> Any:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(repository, path, repo_type="dataset", revision=revision))


def _blobs(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="dataset") / "blobs"


def _begun(repository: str, there: Any) -> int | None:
    """The number of bytes of a file that are downloaded; None if it is complete or its size is unknown."""
    if there.etag is None or there.size is None or (_blobs(repository) / there.etag).exists():
        return None
    partial = _blobs(repository) / f"{there.etag}.going_on"
    return min(partial.stat().st_size, int(there.size)) if partial.exists() else 0


def _fetch(repository: str, revision: str, path: str, there: Any, say: Callable[[str], None]) -> None:
    from filelock import FileLock
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if there.etag is None or there.size is None:
        return
    url = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
    folder = _blobs(repository)
    place, partial = folder / there.etag, folder / f"{there.etag}.going_on"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{there.etag}.going_on.lock"):
        if place.exists():
            return
        partial.touch()
        begin = partial.stat().st_size
        goes_on = f", going on at {begin / 1e6:,.1f} MB" if begin else ""
        say(f"{path}: {there.size / 1e6:,.1f} MB{goes_on}")
        headers = build_hf_headers()
        if urlsplit(there.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token is for the hub, not for the server that stores the files
        if begin > there.size:
            partial.unlink()
            return
        with partial.open("r+b") as file:
            file.seek(begin)
            http_get(there.location, file, resume_size=begin, headers=headers, expected_size=there.size)
        # a small file's tag is not a SHA-256; its length was checked
        if _SHA256.fullmatch(there.etag) is None or file_digest(partial) == there.etag:
            partial.rename(place)
        else:
            partial.unlink()
    (folder / f"{there.etag}.going_on.lock").unlink(missing_ok=True)
