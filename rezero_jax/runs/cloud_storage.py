"""gs:// for fsspec, and so for etils.epath and Orbax: requests outlast an outage of minutes."""

import asyncio
import contextlib
import itertools
import math
import random
import sys
import time
from typing import Any

from aiohttp import ClientTimeout
from fsspec.asyn import sync_wrapper
from gcsfs import GCSFileSystem
from gcsfs.retry import is_retriable
from google.auth.exceptions import RefreshError, TransportError

from rezero_jax.errors import first_line

PATIENCE = 240.0  # seconds of an outage after which requests fail; other processes wait 300
CREDENTIALS_PATIENCE = 10.0  # the same for credentials that are refused: a token may be outdated
LONGEST_PAUSE = 16.0  # seconds between two tries
SILENT = 10.0  # seconds of an outage before the user is told
# gcsfs has no limit but five minutes for a request as a whole.
TIMEOUT = ClientTimeout(total=None, sock_connect=10.0, sock_read=30.0)


class CloudStorage(GCSFileSystem):
    """gcsfs with more patience: its own six tries end after half a minute.

    A request that fails in passing is made again, after random pauses of growing length, until it
    succeeds or the storage has failed for PATIENCE seconds. Every request may be made twice, as the
    answer to the first may be lost: objects are written whole, and it is no error to delete what is
    absent.
    """

    _once = GCSFileSystem._request.__wrapped__
    # All requests run in one thread, that of fsspec's loop.
    _failing_since: float | None = None
    _is_told = False

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **({"requests_timeout": TIMEOUT} | options))

    async def _request(self, *args: Any, **options: Any) -> Any:
        since = math.inf
        for tries in itertools.count():
            try:
                answer = await self._once(*args, **options)
            except Exception as error:
                limit = patience(error)
                if not limit:
                    self._note_answer()
                    raise
                since = min(since, self._note_failure(error))
                if time.monotonic() - since >= limit:
                    raise
            else:
                self._note_answer()
                return answer
            await asyncio.sleep(random.uniform(0.0, min(2.0**tries, LONGEST_PAUSE)))

    def _note_answer(self) -> None:
        self._failing_since, self._is_told = None, False

    def _note_failure(self, error: Exception) -> float:
        """Since when the storage has failed, by time.monotonic(); tells the user once."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > SILENT and not self._is_told:
            self._is_told = True
            what = f"Cloud Storage fails ({first_line(error)}); trying for up to {PATIENCE:.0f} s"
            print(what, file=sys.stderr)
        return self._failing_since

    async def _rm(self, *args: Any, **options: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            await super()._rm(*args, **options)

    rm = sync_wrapper(_rm)


def patience(error: BaseException) -> float:
    """For how many seconds a request that fails so is made again; 0 if that cannot help."""
    if isinstance(error, RefreshError) or getattr(error, "code", None) == 401:
        return CREDENTIALS_PATIENCE if is_retriable(error) else 0.0
    return PATIENCE if is_retriable(error) or isinstance(error, TransportError) else 0.0
