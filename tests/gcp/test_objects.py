"""Conditional writes, by the launcher's client and by the agent's, to one bucket server."""

import aiohttp
import gcsfs
import pytest
import requests
from gcsfs.retry import HttpError
from google.auth.exceptions import TransportError

from gcp import record, staging
from gcp.objects import Bucket, Conflict, PlannedObjects, Unavailable
from gcp.worker import google
from gcp.worker.google import Endpoints, Google
from tests.gcp.bucket import bucket_server
from tests.gcp.memory import MemoryObjects, a_record

WHEEL = ("qwq_jax-0.1.0-py3-none-any.whl", b"wheel")


@pytest.fixture(scope="module")
def url():
    with bucket_server() as url:
        yield url


@pytest.fixture
def bucket(url, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return Bucket("gs://bucket", gcsfs.GCSFileSystem(token="anon", endpoint_url=url, skip_instance_cache=True))


@pytest.fixture
def agents(url):
    agents = Google(Endpoints(storage=url))
    agents.bucket = "bucket"
    agents._token = ("x", float("inf"))
    return agents


def test_generations(bucket):
    assert bucket.get("a/ö b.json") is None
    first = bucket.put("a/ö b.json", b"1", generation=0)
    with pytest.raises(Conflict):
        bucket.put("a/ö b.json", b"2", generation=0)
    second = bucket.put("a/ö b.json", b"2", generation=first)
    with pytest.raises(Conflict):
        bucket.put("a/ö b.json", b"3", generation=first)
    found = bucket.get("a/ö b.json")
    assert (found.data, found.generation) == (b"2", second)
    assert bucket.list("a/") == {"a/ö b.json": 1}


def test_a_wheel_of_several_mebibytes(bucket):
    data = bytes(range(256)) * 20_000
    bucket.put("large", data, generation=0)
    assert bucket.get("large").data == data


def test_a_write_whose_answer_was_lost_is_no_conflict(bucket):
    first = bucket.put("lost", b"same", generation=0)
    assert bucket.put("lost", b"same", generation=0) == first


def test_the_agent_reads_and_writes_the_same_bucket(bucket, agents, monkeypatch):
    monkeypatch.setattr(google.time, "sleep", lambda seconds: None)
    agents.put("agent/x y.json", b"1", only_new=True)
    with pytest.raises(google.Conflict):
        agents.put("agent/x y.json", b"2", only_new=True)
    assert bucket.get("agent/x y.json").data == agents.get("agent/x y.json") == b"1"
    assert agents.get("agent/none") is None
    agents.put("agent/x y.json", b"3")
    assert agents.list("agent/") == ["agent/x y.json"]
    agents.bucket = "no-such-bucket"
    assert agents.get("x") is None


@pytest.mark.parametrize(
    "error",
    [
        HttpError({"code": 503, "message": "Service Unavailable"}),
        requests.exceptions.ProxyError(),
        aiohttp.ClientConnectionError("no route to host"),
        TimeoutError(),
        TransportError("no token now"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bucket_that_does_not_answer_is_one_kind_of_error(error):
    bucket = Bucket("gs://bucket", Failing(error))
    for call in (lambda: bucket.get("x"), lambda: bucket.put("x", b""), lambda: bucket.list("")):
        with pytest.raises(Unavailable, match="gs://bucket does not answer: ."):
            call()


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError("Forbidden: b/bucket"), OSError),
        (FileNotFoundError("b/bucket"), FileNotFoundError),
        (HttpError({"code": 400, "message": "a bad name"}), OSError),
    ],
    ids=["forbidden", "no bucket", "bad request"],
)
def test_what_a_bucket_refuses_stays_what_it_is(error, seen):
    with pytest.raises(seen):
        Bucket("gs://bucket", Failing(error)).list("")


class Failing:
    """A file system whose calls fail."""

    _location = ""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def call(self, *arguments: object, **options: object) -> None:
        raise self._error


def test_a_record_is_replaced_only_by_who_read_it(bucket):
    saved = record.save(bucket, a_record(), generation=0)
    assert record.load(bucket, "job") == saved
    newer = record.save(bucket, saved.record.changed(owner="two"), generation=saved.generation)
    with pytest.raises(Conflict):
        record.save(bucket, saved.record.changed(owner="one"), generation=saved.generation)
    assert record.load(bucket, "job") == newer


def test_a_strange_record_is_told_in_a_sentence():
    objects = MemoryObjects()
    objects.put("qwq_jax/jobs/job/record.json", b'{"uid": 3}')
    with pytest.raises(ValueError, match=r"record.json was not written by this version: .*uid"):
        record.load(objects, "job")


def test_nothing_is_staged_twice_and_a_change_lies_elsewhere():
    objects = MemoryObjects()
    first = staging.stage(objects, {"a/x.toml": b"1"}, wheel=WHEEL, lock=b"lock")
    written = objects.written
    assert staging.stage(objects, {"a/x.toml": b"1"}, wheel=WHEEL, lock=b"lock") == first
    assert objects.written == written
    second = staging.stage(objects, {"a/x.toml": b"2"}, wheel=WHEEL, lock=b"lock")
    assert second.files != first.files and second.wheel == first.wheel


def test_the_agent_is_packed_the_same_every_time():
    assert staging.pack_agent() == staging.pack_agent()


def test_a_rehearsed_bucket_says_what_it_is_asked():
    said: list[str] = []
    objects = PlannedObjects(said.append)
    objects.put("x", b"12", generation=0)
    with pytest.raises(Conflict):
        objects.put("x", b"12", generation=0)
    assert objects.list("") == {"x": 2}
    assert said == ["PUT x (2 bytes if generation is 0)", "LIST "]


@pytest.mark.slow
def test_the_same_sources_make_the_same_wheel():
    first = staging.build_wheel()
    assert staging.build_wheel() == first
