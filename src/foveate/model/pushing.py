"""Files of a saved folder -> a repository on the Hugging Face hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, first_line, one_sentence
from foveate.model.card import CARD, named, unchanged
from foveate.model.folders import shown

# Of what is already in a repository, these are replaced as a whole: a shard more would be a wrong weight.
WEIGHTS = "*.safetensors*"
PARTS = ("model*", "adapter_model*")


@dataclass(frozen=True)
class Push:
    """How a model is pushed: the arguments of these names that every `push_to_hub` takes.

    Attributes:
        commit_message: by default one that names what is pushed.
        commit_description: further text of the commit.
        private: whether a repository that is made now is private; by default as the account says.
        token: with the right to write; by default the one that `hf auth login` has stored.
        revision: the branch, which is made if it is missing; by default main.
        create_pr: whether the commit becomes a pull request.
    """

    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False


def push(
    folder: Path,
    files: Collection[str],
    repository: str,
    how: Push,
    tags: Collection[str] = (),
    what: str = "model",
) -> str:
    """Uploads some files of a folder; the address of the commit.

    Args:
        folder: the folder.
        files: names in it.
        repository: `owner/name`; it is made if it is missing.
        how: see `Push`.
        tags: for the card, if Foveate wrote it.
        what: what is pushed, for the commit's message.

    A card that somebody has written or changed in the repository is kept, and shards of earlier weights are
    deleted where new weights come.

    Raises `FoveateError` if the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repository):
        raise FoveateError(f"{shown(repository)} is not the name of a repository: give owner/name")
    api = HfApi(token=how.token)
    with _explained(repository):
        repository = api.create_repo(repository, private=how.private, exist_ok=True).repo_id
        branch = how.revision
        if branch is not None and not branch.startswith("refs/"):
            api.create_branch(repository, branch=branch, exist_ok=True)
        there = set(api.list_repo_files(repository, revision=branch))
        adds = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
            for name in sorted(files)
            if name != CARD
        ]
        if CARD in files:
            text = (folder / CARD).read_text(encoding="utf-8")
            if unchanged(text):
                text = named(text, repository, tags)
            if not (unchanged(text) and CARD in there and not unchanged(_read(api, repository, branch))):
                adds.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode()))
        stale = [
            CommitOperationDelete(path_in_repo=name)
            for name in sorted(there - set(files))
            for part in PARTS
            if fnmatchcase(name, part + WEIGHTS) and any(fnmatchcase(file, part + WEIGHTS) for file in files)
        ]
        commit = api.create_commit(
            repository,
            [*adds, *stale],
            commit_message=how.commit_message or f"Upload {what}",
            commit_description=how.commit_description,
            revision=branch,
            create_pr=how.create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def _read(api: Any, repository: str, branch: str | None) -> str:
    """The card that a repository has."""
    path = Path(api.hf_hub_download(repository, CARD, revision=branch))
    return path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    with one_sentence(f"{shown(repository)} cannot be pushed"):
        try:
            yield
        except HfHubHTTPError as error:
            code = error.response.status_code
            reason = first_line(error)
            if code in (401, 403):
                reason = "log in with `hf auth login`, or give a token with the right to write there"
            raise FoveateError(
                f"the Hugging Face hub did not take {shown(repository)} ({code}): {reason}"
            ) from error
