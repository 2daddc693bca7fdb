"""What `edgespec recommend` can be told, checked before any post is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

from edgespec.config import PHONES, THREADS
from edgespec.errors import BackendError, InputError
from edgespec.flags import between, check_file, check_folder, flag


@dataclass(frozen=True)
class RecommendConfig:
    """`edgespec recommend`: whose posts, which artists, which model words it, and where the results go."""

    posts: str = flag(
        'file of posts, a JSON object a line: {"user": ..., "text": ..., "time": ...}', positional=True
    )
    artists: str = flag("file of artists, one a line, other spellings behind |: BTS | 방탄소년단")
    bundle: str = flag("folder of the bundle that names clusters and words recommendations")
    output: str = flag("folder of the results; a run that was stopped goes on there", short="-o")
    clusters: int = flag("clusters of fans; 0: as many as give the largest silhouette", 0)
    profile: tuple[str, ...] = flag("devices to predict the wording's speed for, or .toml files", PHONES)
    threads: int = flag(THREADS, 0)

    def check(self) -> RecommendConfig:
        """Itself, or an InputError for the first value that cannot work."""
        if not os.path.isfile(self.posts):
            raise InputError(f"posts {self.posts!r} is not a file", "give a file of JSON lines")
        check_file("artists", self.artists)
        if os.path.getsize(self.posts) == 0:
            raise InputError(f"posts {self.posts!r} is empty", 'a line is {"user": ..., "text": ...}')
        between("clusters", self.clusters, 0, 100)
        between("threads", self.threads, 0, 256)
        check_folder("output", self.output)
        if find_spec("sklearn") is None:
            raise BackendError("scikit-learn is not installed", "pip install 'edgespec[workloads]'")
        return self
