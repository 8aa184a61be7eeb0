"""A batch on a real Dask cluster: a scheduler and two workers, each a process, here and in network namespaces."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from imagekit.digests import file_digest
from imagekit.formats.base import MiB
from tests.cluster import Cluster, cluster
from tests.disks import noise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.oracle,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are looked at through /proc"),
]
BAD = "bad.qcow2"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.raw").write_bytes(noise(MiB, number) * (8 * number + 4) + bytes(3 * MiB))
    (folder / BAD).write_bytes(b"QFI\xfb" + bytes(100))
    return folder


def command(images: Path, out: Path, *options: str) -> list[str]:
    here = [sys.executable, "-m", "imagekit", "batch", str(images), "--out", str(out), "-O", "vhdx"]
    return [*here, "--output", "json", *options]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, **(more or {})}


def targets(out: Path) -> dict[str, str]:
    return {one.name: file_digest(one) for one in sorted(out.glob("*.vhdx"))}


def check_same(images: Path, out: Path, done: subprocess.CompletedProcess[str]) -> None:
    """The files are those of a run on this computer, and nothing else is there."""
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert (found["done"], found["failed"]) == (4, 1)
    reference = out.with_name("reference")
    subprocess.run(command(images, reference), capture_output=True)
    assert targets(out) == targets(reference)
    assert len(targets(out)) == 4
    assert sorted(one.name for one in out.iterdir()) == sorted(one.name for one in reference.iterdir())


def test_a_cluster_makes_the_same_bytes(images: Path, tmp_path: Path) -> None:
    with cluster(tmp_path) as made:
        run = command(images, tmp_path / "out", "--scheduler", made.address)
        done = subprocess.run(run, capture_output=True, text=True)
    check_same(images, tmp_path / "out", done)


def test_a_worker_killed_in_the_middle_of_an_item_costs_nothing_but_time(images: Path, tmp_path: Path) -> None:
    (images / "large.raw").write_bytes(noise(MiB) * 400)
    out = tmp_path / "out"
    out.mkdir()
    with cluster(tmp_path) as made:
        run = subprocess.Popen(
            command(images, out, "--scheduler", made.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        worker = made.busy_with(out)
        worker.kill()
        worker.wait()
        said, errors = run.communicate()
    (images / "large.raw").unlink()
    assert (json.loads(said)["done"], json.loads(said)["failed"]) == (5, 1), errors
    found = {one["target"]: one["state"] for one in json.loads((out / "report.json").read_text())["items"]}
    assert found["large.vhdx"] == "done"
    (out / "large.vhdx").unlink()
    check_same(images, out, subprocess.CompletedProcess([], run.returncode, json.dumps({"done": 4, "failed": 1}), ""))


def test_a_scheduler_that_dies_ends_the_run_and_resume_makes_the_rest_here(images: Path, tmp_path: Path) -> None:
    with resumed_after(images, tmp_path) as (made, run):
        made.scheduler.kill()
        _, errors = run.communicate(timeout=120)
        assert (run.returncode, "--resume goes on" in errors) == (16, True), errors


def test_ctrl_c_stops_the_workers_too_and_resume_makes_the_rest_here(images: Path, tmp_path: Path) -> None:
    with resumed_after(images, tmp_path) as (_, run):
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 130, errors


@contextmanager
def resumed_after(images: Path, tmp_path: Path) -> Iterator[tuple[Cluster, subprocess.Popen[str]]]:
    """A run with a large item at work, which the block stops; a second run, without the cluster, makes the rest."""
    (images / "large.raw").write_bytes(noise(MiB) * 400)
    out = tmp_path / "out"
    out.mkdir()
    with cluster(tmp_path) as made:
        run = subprocess.Popen(
            command(images, out, "--scheduler", made.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made.busy_with(out)
        yield made, run
    (images / "large.raw").unlink()
    done = subprocess.run(command(images, out, "--resume"), capture_output=True, text=True)
    (out / "large.vhdx").unlink(missing_ok=True)
    assert done.returncode == 3, done.stderr
    check_same(images, out, subprocess.CompletedProcess([], 3, json.dumps({"done": 4, "failed": 1}), ""))


def test_workers_need_what_an_item_asks_for(images: Path, tmp_path: Path) -> None:
    """Only one of the two offers the resource: it does all."""
    with cluster(tmp_path, offers=(("--resources", "imagekit=1"), ())) as made:
        run = command(images, tmp_path / "out", "--scheduler", made.address, "--resource", "imagekit=1")
        done = subprocess.run(run, capture_output=True, text=True)
    items = json.loads((tmp_path / "out/report.json").read_text())["items"]
    assert len({one["where"] for one in items if one["state"] == "done"}) == 1
    check_same(images, tmp_path / "out", done)


def test_nobody_there_is_said(images: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, workers=()) as made:
        run = command(images, tmp_path / "out", "--scheduler", made.address)
        done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, "has no workers" in done.stderr) == (16, True), done.stderr


@contextmanager
def two_networks() -> Iterator[tuple[list[str], list[str], str]]:
    """Two network namespaces with a cable between them; how to start a command in each, and the first's address."""
    ip = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin")
    if ip is None:
        pytest.skip("ip is not installed (Debian: iproute2)")
    mark = uuid4().hex[:6]
    names = [f"ik{mark}a", f"ik{mark}b"]
    made: list[str] = []

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ip, *words], capture_output=True, text=True)

    try:
        for name in names:
            done = run("netns", "add", name)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
            made.append(name)
        done = run(
            "link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1]
        )
        if done.returncode:
            pytest.skip(f"no network between namespaces here: {done.stderr.strip()}")
        for number, name in enumerate(names, start=1):
            assert run("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", name).returncode == 0
            for device in (name, "lo"):
                assert run("-n", name, "link", "set", device, "up").returncode == 0
        first, second = ([ip, "netns", "exec", name] for name in names)
        yield first, second, "10.213.7.1"
    finally:
        for name in made:
            run("netns", "delete", name)


def test_workers_in_another_network_make_the_same_bytes(images: Path, tmp_path: Path) -> None:
    with (
        two_networks() as (here, there, host),
        cluster(tmp_path, workers=(here, there), scheduler=here, host=host) as made,
    ):
        assert made.address.startswith(f"tcp://{host}:")
        run = [*here, *command(images, tmp_path / "out", "--scheduler", made.address)]
        done = subprocess.run(run, capture_output=True, text=True)
    check_same(images, tmp_path / "out", done)


def test_over_tls_and_not_without_a_certificate(images: Path, tmp_path: Path) -> None:
    files = certificates(tmp_path)
    settings = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(path) for name, path in files.items()}
    options = ("--protocol", "tls")
    with cluster(tmp_path, options=options, environment=settings) as made:
        assert made.address.startswith("tls://")
        run = command(images, tmp_path / "out", "--scheduler", made.address)
        bare = subprocess.run(run, capture_output=True, text=True)
        assert (bare.returncode, "does not answer" in bare.stderr) == (16, True), bare.stderr
        done = subprocess.run(run, capture_output=True, text=True, env=environment(settings))
    check_same(images, tmp_path / "out", done)


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, and one certificate for scheduler, workers and client; under the names of Dask's settings."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "member")}
    for name, key in keys.items():
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        signed = builder.sign(keys["authority"], hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}.key").write_bytes(private)
    found = {"CA_FILE": folder / "authority.crt"}
    for part in ("SCHEDULER", "WORKER", "CLIENT"):
        found |= {f"{part}__CERT": folder / "member.crt", f"{part}__KEY": folder / "member.key"}
    return found
