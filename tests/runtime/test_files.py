"""model/file_checks.py: a broken download is named before a parser sees it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.file_checks import check_file, why_not_the_file

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 538090408\n"
)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (POINTER, "Git LFS pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "HTML page"),
        (b"<html lang='en'>", "HTML page"),
    ],
)
def test_a_broken_download_is_named(tmp_path: Path, content: bytes, named: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named) as error:
        check_file(path)
    assert str(path) in str(error.value)


def test_a_directory_and_a_pipe_are_named(tmp_path: Path):
    assert "directory" in why_not_the_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in why_not_the_file(tmp_path / "pipe")  # and does not wait for a writer


@pytest.mark.parametrize("content", [b"", b"{}", b'{"text": "<html>"}', b"version 1\n"])
def test_other_files_pass(tmp_path: Path, content: bytes):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    assert why_not_the_file(path) is None
    assert why_not_the_file(tmp_path / "absent") is None
