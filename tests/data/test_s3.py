"""Shards in an object store: moto's server on this machine speaks S3."""

import io

import pytest
from litdata_folders import write_litdata
from shards import no_waiting, png, write_shards

from hpm.core.errors import UserError
from hpm.data.sources import open_data
from hpm.data.streams import transport
from hpm.data.streams.archives import Archives, images_of
from hpm.data.streams.shards import find_shards

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
pytest.importorskip("braceexpand", reason="braceexpand is not installed")
server = pytest.importorskip("moto.server", reason="moto is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=3)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    samples = [{"image": png(n), "label": n} for n in range(20)]
    formats = {"image": "jpeg", "label": "int"}
    return write_litdata(tmp_path_factory.mktemp("litdata"), samples, formats)


@pytest.fixture(scope="module")
def bucket(folder, chunks):
    """`s3://data/set/s-N.tar` on a server whose address is in the environment, as a user has it."""
    serving = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    serving.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = serving.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        transport._s3_client.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for file in folder.iterdir():
            client.put_object(Bucket="data", Key=f"set/{file.name}", Body=file.read_bytes())
        for file in chunks.iterdir():
            client.put_object(Bucket="data", Key=f"lit/{file.name}", Body=file.read_bytes())
        yield "s3://data/set"
        transport._s3_client.cache_clear()
    serving.stop()


def test_the_images_are_those_of_the_files(bucket, folder):
    found = Archives(f"{bucket}/s-*.tar")
    files = Archives(f"{folder}/s-*.tar")
    assert [list(found.read(n)) for n in range(3)] == [list(files.read(n)) for n in range(3)]
    assert find_shards(f"{bucket}/s-{{0..2}}.tar") == found.shards
    assert find_shards("s3://data/*-[01].tar") == found.shards[:2]


@pytest.mark.parametrize("name", ["s3://data/lit", "s3://data/lit/", "s3://data/lit/index.json"])
def test_a_litdata_folder(bucket, name):
    stream = open_data(name)
    found = [[entry.data for entry in stream.read(shard)] for shard in range(3)]
    assert found == [[png(n) for n in range(a, b)] for a, b in ((0, 8), (8, 16), (16, 20))]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(bucket, folder, monkeypatch):
    no_waiting(monkeypatch)
    open_at, starts = transport._s3_at, []

    def breaking(url, start):
        starts.append(start)
        opened = open_at(url, start)
        left = io.BytesIO(opened.body.read(1000) if len(starts) < 3 else opened.body.read())

        class Broken:
            def read(self, size):
                data = left.read(size)
                if not data and len(starts) < 3:
                    raise ConnectionResetError("reset by peer")
                return data

            def close(self):
                pass

        return opened._replace(body=Broken())

    monkeypatch.setattr(transport, "_s3_at", breaking)
    assert list(images_of(f"{bucket}/s-1.tar")) == list(images_of(f"{folder}/s-1.tar"))
    assert starts == [0, 1000, 2000]


@pytest.mark.parametrize(
    ("name", "words"),
    [("s3://data/set/none.tar", "404 NoSuchKey"), ("s3://none/s.tar", "404 NoSuchBucket")],
)
def test_what_is_not_there(bucket, name, words):
    with pytest.raises(UserError, match=f"the object store answers {words}"):
        list(images_of(name))


def test_nothing_matches(bucket):
    with pytest.raises(UserError, match="no shard matches"):
        find_shards("s3://data/none-*.tar")
    with pytest.raises(UserError, match="404 NoSuchBucket"):
        find_shards("s3://none/*.tar")


def test_no_object_store(bucket, monkeypatch):
    no_waiting(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    transport._s3_client.cache_clear()
    try:
        with pytest.raises(UserError, match=r"\(6 attempts\)"):
            list(images_of(f"{bucket}/s-1.tar"))
        with pytest.raises(UserError, match="no connection"):
            find_shards(f"{bucket}/*.tar")
    finally:
        transport._s3_client.cache_clear()
