"""Buckets in memory: objects with generations, written whole and under preconditions."""

import base64
import dataclasses
import hashlib
import threading
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Object:
    """An object as it was written."""

    bucket: str
    name: str
    content: bytes
    generation: int
    written: float  # seconds since the epoch

    def resource(self) -> dict[str, Any]:
        """The metadata that the API returns."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.written))
        return {
            "kind": "storage#object",
            "bucket": self.bucket,
            "name": self.name,
            "size": str(len(self.content)),
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "timeCreated": moment,
            "updated": moment,
        }


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Store:
    """The buckets, for several threads."""

    def __init__(self, buckets: list[str]):
        self._buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self._generation = 0
        self._lock = threading.Lock()

    def bucket(self, name: str) -> dict[str, Object]:
        """The objects of a bucket by name; raises Refused (404) if there is no such bucket."""
        if name not in self._buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self._buckets[name]

    def get(self, bucket: str, name: str) -> Object:
        """An object; raises Refused (404) if it does not exist."""
        found = self.bucket(bucket).get(name)
        if found is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, content: bytes, if_generation: str | None) -> Object:
        """Writes an object; raises Refused (412) if its generation differs (0: no object)."""
        with self._lock:
            self._check(bucket, name, if_generation)
            self._generation += 1
            made = Object(bucket, name, content, self._generation, time.time())
            self.bucket(bucket)[name] = made
            return made

    def delete(self, bucket: str, name: str, if_generation: str | None) -> None:
        """Deletes an object; raises Refused (404, 412)."""
        with self._lock:
            self.get(bucket, name)
            self._check(bucket, name, if_generation)
            del self.bucket(bucket)[name]

    def _check(self, bucket: str, name: str, if_generation: str | None) -> None:
        found = self.bucket(bucket).get(name)
        now = found.generation if found else 0
        if if_generation is not None and int(if_generation) != now:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """A page of the objects of a bucket."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        after = query.get("pageToken", "")
        count = int(query.get("maxResults", "1000"))
        with self._lock:
            names = sorted(n for n in self.bucket(bucket) if n.startswith(prefix) and n >= start)
            items, prefixes, last = list[dict[str, Any]](), list[str](), ""
            more = False
            for name in names:
                if end and name >= end:
                    break
                rest = name[len(prefix) :]
                folder = None
                if delimiter and delimiter in rest:
                    folder = prefix + rest.split(delimiter)[0] + delimiter
                if (folder or name) <= after or folder in prefixes:
                    continue
                if len(items) + len(prefixes) == count:
                    more = True
                    break
                last = folder or name
                if folder:
                    prefixes.append(folder)
                else:
                    items.append(self.bucket(bucket)[name].resource())
        page: dict[str, Any] = {"kind": "storage#objects"}
        page |= {"items": items} if items else {}
        page |= {"prefixes": prefixes} if prefixes else {}
        return page | ({"nextPageToken": last} if more else {})
