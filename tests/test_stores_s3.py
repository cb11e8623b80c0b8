"""Stores behind s3://: same contents as the folder, a shared cache, one-line errors; and a DVC remote."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from samlove.data.loader import ExpressionDataset, collate
from samlove.errors import RequestError, SamloveError
from stores import FeatureStore, ShardReader, ShardWriter
from stores.remote import REMOTE_OPEN, Cache, RemotePath, as_path
from tests.s3_service import ask, reconnect, s3_service, upload
from tests.test_loader import assert_equal
from tests.test_stores_remote import SHARDS, array, assert_all, read_at_random
from tests.tiny_pack import make_shards, make_store

CHECK = "; check the URL, the credentials and the endpoint"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_service("team") as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def shards(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SHARDS tar files of one sample each, also at s3://team/shards; s3://team/shards-2 has the same prefix."""
    root = tmp_path_factory.mktemp("made") / "shards"
    with ShardWriter(root, samples_per_shard=1, fingerprint={"made": "here"}) as writer:
        for number in range(SHARDS):
            writer.write(f"k.{number}", {"x": array(number), "rows": [number]})
    boto3.client("s3").put_object(Bucket="team", Key="shards/", Body=b"")  # web consoles create folders this way
    upload(root, "s3://team/shards")
    upload(root, "s3://team/shards-2")
    return root


def at(url: str, cache: Path, limit: int = 10**9) -> RemotePath:
    path = as_path(url, Cache(cache, limit))
    assert isinstance(path, RemotePath)
    return path


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_set_read_from_s3_is_the_same(shards, tmp_path, with_index):
    url = "s3://team/shards"
    if not with_index:
        root = shutil.copytree(shards, tmp_path / "copy")
        for name in ("manifest.json", "index.arrow", "files.arrow"):
            (root / name).unlink()
        upload(root, url := "s3://team/without-index")
    reader = ShardReader(at(url, tmp_path / "cache"))
    assert reader.manifest == (ShardReader(shards).manifest if with_index else {})
    assert reader.keys() == ShardReader(shards).keys()
    assert_all(reader)


def test_a_feature_store_read_from_s3_is_the_same(endpoint, tmp_path):
    for name in ("audio", "visual", "text", "sam2"):
        local = make_store(tmp_path, name)
        upload(tmp_path / name, f"s3://team/features/{name}")
        store = FeatureStore.open(at(f"s3://team/features/{name}", tmp_path / "cache"))
        assert store.manifest == local.manifest and store.keys() == local.keys() and store.failures == local.failures
        for key in local.keys():
            for rows in (None, slice(1, 2)):
                found, expected = store.read(key, rows), local.read(key, rows)
                assert set(found) == set(expected)
                for array_name, values in expected.items():
                    np.testing.assert_array_equal(found[array_name], values, strict=True)
        assert len(store._opened) <= REMOTE_OPEN


def test_batches_read_from_s3_are_the_same(endpoint, tmp_path, monkeypatch):
    make_shards(tmp_path)
    upload(tmp_path / "shards", "s3://team/packed")
    monkeypatch.setenv("STORES_CACHE", str(tmp_path / "cache"))
    local, remote = ExpressionDataset(tmp_path / "shards"), ExpressionDataset("s3://team/packed")
    assert remote.features == local.features
    shutil.rmtree(tmp_path / "cache")  # so that each worker must open its own connection
    workers = DataLoader(remote, 2, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    for found, expected in zip(workers, DataLoader(local, 2, collate_fn=collate), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache_smaller_than_the_shard_set(shards, tmp_path, method):
    size = (shards / "shard-00000.tar").stat().st_size
    context = multiprocessing.get_context(method)
    reader = ShardReader(at("s3://team/shards", tmp_path / "cache", 7 * size))
    assert_all(reader, [0])  # so that a file and a connection are open before a fork
    others = [context.Process(target=read_at_random, args=(reader, seed)) for seed in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0] * 3


def test_a_replacement_of_the_same_size_is_not_mistaken_for_the_listed_object(shards, tmp_path):
    """Whether or not this process still has the bucket's listing in memory."""
    upload(shards, "s3://team/replaced")
    path = at("s3://team/replaced", tmp_path / "cache")
    assert path.folder.files
    tar = "shard-00003.tar"
    boto3.client("s3").put_object(Bucket="team", Key=f"replaced/{tar}", Body=(shards / "shard-00004.tar").read_bytes())
    for forget in (lambda: None, reconnect):
        forget()
        with pytest.raises(SamloveError, match=rf"{tar}: expected (\d+) bytes as listed .*, found \1 .*; run the same"):
            path.joinpath(tar).open()
    relisted = at("s3://team/replaced", tmp_path / "cache").joinpath(tar)
    with relisted.open() as file:
        assert file.read() == (shards / "shard-00004.tar").read_bytes()


def test_a_missing_bucket_store_or_object_is_named(shards, tmp_path):
    with pytest.raises(SamloveError, match=f"^s3://nobodys/x: cannot be fetched .*bucket does not exist.*{CHECK}"):
        ShardReader(at("s3://nobodys/x", tmp_path / "cache"))
    with pytest.raises(RequestError, match=r"^s3://team/x: expected a folder with \.tar shards"):
        ShardReader(at("s3://team/x", tmp_path / "cache"))
    with pytest.raises(RequestError, match=r"^s3://team/x/manifest\.json: no such file"):
        FeatureStore.open(at("s3://team/x", tmp_path / "cache"))
    upload(shards, "s3://team/vanishing")
    reader = ShardReader(at("s3://team/vanishing", tmp_path / "cache"))
    boto3.client("s3").delete_object(Bucket="team", Key="vanishing/shard-00003.tar")
    with pytest.raises(SamloveError, match=r"^s3://team/vanishing/shard-00003\.tar: cannot be fetched \(FileNotFound"):
        reader[3]


@pytest.fixture
def guarded(shards, endpoint, monkeypatch) -> Iterator[dict[str, str]]:
    """Make the service require valid credentials; yields those of a user without any read permission."""
    iam = boto3.client("iam", region_name="us-east-1")
    iam.create_user(UserName="guest")
    key = iam.create_access_key(UserName="guest")["AccessKey"]
    ask(f"{endpoint}/moto-api/reset-auth", "0")
    yield {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    ask(f"{endpoint}/moto-api/reset-auth", "inf")
    iam.delete_access_key(UserName="guest", AccessKeyId=key["AccessKeyId"])
    iam.delete_user(UserName="guest")
    reconnect()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "PermissionError: .*Access Key Id"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "PermissionError: .*signature"),
        ({}, "PermissionError: Access Denied"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "NoCredentialsError: "),
    ],
    ids=["key", "secret", "no permission", "none"],
)
def test_invalid_credentials_are_named(guarded, tmp_path, monkeypatch, changes, reason):
    for name, value in (guarded | changes).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # ~/.aws may contain real credentials
    reconnect()
    with pytest.raises(SamloveError, match=rf"^s3://team/shards: cannot be fetched \({reason}.*\){CHECK}") as caught:
        ShardReader(at("s3://team/shards", tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_does_not_respond_is_named(endpoint, tmp_path, monkeypatch):
    with socket.socket() as bound:  # bound but not listening, so that no other process gets the port
        bound.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        reconnect()
        with pytest.raises(SamloveError, match=rf"^s3://team/shards: cannot be fetched \(.*{nowhere}.*\){CHECK}"):
            ShardReader(at("s3://team/shards", tmp_path / "cache"))
    reconnect()


def opened_with(tmp_path: Path, *settings: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Open s3://team/shards in a new process whose only S3 environment variables are `settings`."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    given = dict(setting.split("=", 1) for setting in settings)
    program = f"{before}\nfrom stores import ShardReader\nprint(len(ShardReader('s3://team/shards')))"
    environment = {**bare, "HOME": str(tmp_path), "STORES_CACHE": str(tmp_path / "cache"), **given}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("way", ["AWS", "profile", "FSSPEC"])
def test_every_way_to_set_endpoint_and_credentials_works(shards, endpoint, tmp_path, way):
    if way == "profile":
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws" / "config").write_text(f"[profile lab]\nendpoint_url = {endpoint}\n")
        (tmp_path / ".aws" / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    settings = {
        "AWS": [f"AWS_ENDPOINT_URL={endpoint}", "AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY=b"],
        "profile": ["AWS_PROFILE=lab"],
        "FSSPEC": [f"FSSPEC_S3_ENDPOINT_URL={endpoint}", "FSSPEC_S3_KEY=a", "FSSPEC_S3_SECRET=b"],
    }[way]
    done = opened_with(tmp_path, *settings)
    assert (done.stdout, done.returncode) == (f"{SHARDS}\n", 0), done.stderr


def test_without_s3fs_the_error_says_what_to_install(tmp_path):
    done = opened_with(tmp_path, before="import sys; sys.modules['s3fs'] = None  # as if it were not installed")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("samlove.errors.RequestError: s3://team/shards: ") and 'pip install -e ".[s3]"' in last


def dvc(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "dvc", "--quiet", *arguments]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"dvc {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


def test_dvc_pushes_to_s3_and_pulls_from_it(endpoint, tmp_path):
    """The commands of docs/sharing.md; the second project has only .dvc/config and audio.dvc of the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    dvc(first, "init", "--no-scm")
    dvc(first, "remote", "add", "--default", "team", "s3://team/samlove")
    dvc(first, "remote", "modify", "team", "endpointurl", endpoint)
    local = make_store(first, "audio")
    dvc(first, "add", "audio")
    dvc(first, "push")
    assert any("/samlove/files/md5/" in name for name in fsspec.filesystem("s3").find("team/samlove"))
    (second / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", "audio.dvc"):
        shutil.copy(first / name, second / name)
    dvc(second, "pull", "audio")
    pulled = FeatureStore.open(second / "audio")
    assert pulled.manifest == local.manifest
    for key in local.keys():
        for name, values in local.read(key).items():
            np.testing.assert_array_equal(pulled.read(key)[name], values, strict=True)
