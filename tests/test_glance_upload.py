"""Uploads to Glance: active with the hash of what was sent, or not there. The service here breaks on request."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures.efi_disks import ESP, UEFI_CA, WINDOWS_CA, Fat, gpt_disk, loader
from imagekit.cli.app import run
from imagekit.errors import (
    Cancelled,
    SourceError,
    TargetError,
    ToolError,
    UnsafeImage,
    UnsupportedFeature,
    UsageError,
    VerificationFailed,
)
from imagekit.formats.base import GiB, MiB
from imagekit.launch.tiny_guest import write_tiny_guest
from imagekit.progress import Progress
from tests.disks import noise
from tests.glance_service import FakeService, fake_service

NAME = "glance:debian"


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake_service() as made:
        yield made


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "disk.raw"
    path.write_bytes(noise(3 * MiB) + bytes(5 * MiB))
    return path


@pytest.fixture(scope="module")
def vhdx(raw: Path) -> Path:
    path = raw.with_suffix(".vhdx")
    imagekit.convert(raw, path, source_format="raw")
    return path


def upload(service: FakeService, path: Path, name: str = NAME, **options: Any) -> Any:
    return imagekit.upload(path, name, glance_url=service.address, **options)


def test_the_image_is_the_file_and_the_result_says_so(service: FakeService, vhdx: Path) -> None:
    done = upload(service, vhdx)
    image = service.images[done.id]
    assert service.data[done.id] == vhdx.read_bytes()
    assert (image["name"], image["disk_format"], image["container_format"]) == ("debian", "vhdx", "bare")
    assert (image["status"], image["min_disk"]) == ("active", 1)
    assert done.checksum.value == hashlib.sha512(vhdx.read_bytes()).hexdigest()
    assert "hw_machine_type" not in image  # nothing on it boots, so nobody knows


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_hash_of_glances_is_computed_afterwards(service: FakeService, vhdx: Path, algorithm: str) -> None:
    service.algorithm = algorithm
    assert upload(service, vhdx).checksum.algorithm == algorithm
    service.lies = {"os_hash_value": "0" * len(hashlib.new(algorithm).hexdigest())}
    with pytest.raises(VerificationFailed):
        upload(service, vhdx, "glance:other")
    assert len(service.images) == 1


def efi(path: Path, signer: str | None) -> Path:
    files = {"EFI/BOOT/BOOTX64.EFI": loader(signers=[] if signer is None else [signer])}
    path.write_bytes(gpt_disk([(ESP, Fat(files, bits=12).volume())]))
    return path


@pytest.mark.parametrize(
    ("signer", "expected"),
    [
        (UEFI_CA, {"hw_machine_type": "hyperv-gen2", "os_secure_boot": "optional", "os_type": "linux"}),
        (WINDOWS_CA, {"hw_machine_type": "hyperv-gen2", "os_secure_boot": "optional", "os_type": "windows"}),
        (None, {"hw_machine_type": "hyperv-gen2"}),
    ],
    ids=["uefi-ca", "windows", "unsigned"],
)
def test_the_properties_are_what_the_boot_loader_says(
    service: FakeService, tmp_path: Path, signer: str | None, expected: dict[str, str]
) -> None:
    done = upload(service, efi(tmp_path / "efi.raw", signer), format="raw")
    names = ("hw_machine_type", "os_secure_boot", "os_type")
    assert {name: service.images[done.id][name] for name in names if name in service.images[done.id]} == expected


def test_a_bios_disk_is_generation_1_and_min_disk_is_rounded_up(service: FakeService, tmp_path: Path) -> None:
    write_tiny_guest(tmp_path / "tiny.raw")
    imagekit.convert(tmp_path / "tiny.raw", tmp_path / "tiny.vhd", size=GiB + MiB)
    done = upload(service, tmp_path / "tiny.vhd")
    image = service.images[done.id]
    assert (image["hw_machine_type"], image["disk_format"], image["min_disk"]) == ("hyperv-gen1", "vhd", 2)
    assert "os_secure_boot" not in image


def test_a_vhd_that_only_uefi_boots_is_warned_of(service: FakeService, tmp_path: Path) -> None:
    imagekit.convert(efi(tmp_path / "efi.raw", UEFI_CA), tmp_path / "efi.vhd", source_format="raw")
    assert any("takes no VHD" in warning for warning in upload(service, tmp_path / "efi.vhd").warnings)


def test_the_callers_properties_win_and_an_empty_one_is_left_out(service: FakeService, tmp_path: Path) -> None:
    path = efi(tmp_path / "efi.raw", UEFI_CA)
    chosen = {"os_secure_boot": "required", "os_type": "", "min_ram": "2048", "os_distro": "debian"}
    done = upload(service, path, format="raw", properties=chosen, visibility="community", protected=True)
    image = service.images[done.id]
    assert (image["os_secure_boot"], image["min_ram"], image["os_distro"]) == ("required", 2048, "debian")
    assert "os_type" not in image
    assert (image["visibility"], image["protected"]) == ("community", True)
    # Protected only when all is well: what is protected cannot be deleted again.
    assert [one.split()[0] for one in service.requests] == ["GET", "POST", "PUT", "GET", "PATCH"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({("POST", "/images"): 403}, ToolError),
        ({("POST", "/images"): 401}, ToolError),
        ({("PUT", "/file"): 415}, ToolError),
        ({("PUT", "/file"): 413}, ToolError),
        ({("PUT", "/file"): 500}, ToolError),
        ({("PUT", "/file"): 404}, SourceError),
        ({("PATCH", ""): 403}, ToolError),
    ],
    ids=["create-403", "create-401", "put-415", "put-413", "put-500", "deleted", "protect-403"],
)
def test_whatever_glance_refuses_leaves_no_image(
    service: FakeService, vhdx: Path, fault: dict[tuple[str, str], int], error: type[Exception]
) -> None:
    service.faults = fault
    with pytest.raises(error) as caught:
        upload(service, vhdx, protected=True)
    assert service.images == {}
    if error is ToolError:
        assert "for a reason" in str(caught.value)


def test_a_hang_up_while_it_is_sent_leaves_no_image(service: FakeService, vhdx: Path) -> None:
    service.reads = 1000
    with pytest.raises(ToolError, match="does not answer"):
        upload(service, vhdx)
    assert service.images == {}


@pytest.mark.parametrize(
    "lies",
    [
        {"os_hash_value": "0" * 128},
        {"size": 5},
        {"status": "queued"},
        {"os_hash_algo": "streebog", "checksum": "0" * 32},
        {"os_hash_algo": None, "checksum": None},
    ],
    ids=["hash", "size", "status", "md5", "no-hash"],
)
def test_what_glance_has_must_be_what_was_sent(service: FakeService, vhdx: Path, lies: dict[str, Any]) -> None:
    service.lies = lies
    with pytest.raises(VerificationFailed):
        upload(service, vhdx)
    assert service.images == {}


def test_bytes_that_change_on_the_way_are_noticed(service: FakeService, vhdx: Path) -> None:
    service.stores = lambda data: data[:-1] + b"?"
    with pytest.raises(VerificationFailed, match="sha512"):
        upload(service, vhdx)
    assert service.images == {}


def test_an_image_that_cannot_be_deleted_again_is_named(service: FakeService, vhdx: Path) -> None:
    service.faults = {("PUT", "/file"): 500, ("DELETE", ""): 403}
    with pytest.raises(ToolError) as caught:
        upload(service, vhdx)
    (left,) = service.images
    assert left in (caught.value.hint or "")


def test_cancelling_leaves_no_image(service: FakeService, vhdx: Path) -> None:
    stop = threading.Event()

    def told(progress: Progress) -> None:
        if progress.phase == "upload" and progress.done:
            stop.set()

    with pytest.raises(Cancelled):
        upload(service, vhdx, progress=told, cancel=stop)
    assert service.images == {}


def test_a_file_that_changes_while_it_is_sent_leaves_no_image(
    service: FakeService, vhdx: Path, tmp_path: Path
) -> None:
    path = tmp_path / "changing.vhdx"
    path.write_bytes(vhdx.read_bytes())

    def told(progress: Progress) -> None:
        if progress.phase == "upload" and progress.done:
            with path.open("r+b") as file:
                file.write(b"x")

    with pytest.raises(SourceError, match="changed"):
        upload(service, path, progress=told)
    assert service.images == {}


def test_a_fixed_vhd_is_explained_before_anything_is_sent(service: FakeService, raw: Path, tmp_path: Path) -> None:
    imagekit.convert(raw, tmp_path / "fixed.vhd", source_format="raw", subformat="fixed")
    with pytest.raises(UnsupportedFeature, match="415") as caught:
        upload(service, tmp_path / "fixed.vhd")
    assert "--upload" in (caught.value.hint or "")
    assert service.requests == ["GET /v2/images?name=debian&limit=20"]
    done = upload(service, tmp_path / "fixed.vhd", disk_format="raw")
    assert service.images[done.id]["disk_format"] == "raw"


@pytest.mark.parametrize("name", ["debian", "glance:", "glance:6f9c1d2e-0b1a-4c3d-8e5f-001122334455", "glance:a\nb"])
def test_a_target_must_be_a_name(service: FakeService, vhdx: Path, name: str) -> None:
    with pytest.raises(UsageError):
        upload(service, vhdx, name)


def test_a_name_is_not_given_twice_unless_asked(service: FakeService, vhdx: Path) -> None:
    upload(service, vhdx)
    with pytest.raises(TargetError, match="has that name"):
        upload(service, vhdx)
    upload(service, vhdx, same_name=True)
    assert len(service.images) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"properties": {"name": "x"}},
        {"properties": {"min_disk": "many"}},
        {"disk_format": "iso"},
        {"disk_format": "vhd"},
        {"visibility": "nobody"},
        {"follow_references": True},
        {"snapshot": "one"},
        {"nonsense": 1},
    ],
    ids=lambda options: str(next(iter(options))),
)
def test_what_makes_no_sense_is_a_usage_error(service: FakeService, vhdx: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        upload(service, vhdx, **options)
    assert service.images == {}


def test_an_unsafe_or_packed_file_is_not_sent(service: FakeService, vhdx: Path, tmp_path: Path) -> None:
    imagekit.create(tmp_path / "child.vhdx", parent=str(vhdx))
    with pytest.raises(UnsafeImage):
        upload(service, tmp_path / "child.vhdx")
    import gzip

    (tmp_path / "disk.vhdx.gz").write_bytes(gzip.compress(vhdx.read_bytes()))
    with pytest.raises(UnsupportedFeature, match="packed"):
        upload(service, tmp_path / "disk.vhdx.gz")
    assert service.images == {}


def test_convert_uploads_and_keeps_no_file_that_was_not_named(
    service: FakeService,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    at = ["--glance-url", service.address, "-f", "raw"]
    assert run(["convert", str(raw), "--upload", NAME, *at, "--output", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["verified"], said["upload"]["disk-format"], said["upload"]["name"]) == ("content", "vhdx", "debian")
    assert service.images[said["upload"]["id"]]["status"] == "active"
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept.qcow2"
    assert run(["convert", str(raw), str(kept), "--upload", "glance:kept", "--property", "os_distro=x", *at]) == 0
    assert "os_distro=x" in capsys.readouterr().out
    assert hashlib.sha512(kept.read_bytes()).hexdigest() in {one["os_hash_value"] for one in service.images.values()}


def test_exit_codes_of_the_command_line(
    service: FakeService, vhdx: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--glance-url", service.address]
    assert run(["upload", str(vhdx), NAME, *at]) == 0
    assert "hash" not in capsys.readouterr().err
    assert run(["upload", str(vhdx), NAME, *at]) == 14
    assert run(["upload", str(vhdx), "debian", *at]) == 2
    assert run(["upload", str(vhdx), "glance:b", *at, "--property", "nonsense"]) == 2
    assert run(["upload", str(tmp_path / "missing.vhdx"), "glance:b", *at]) == 10
    assert run(["convert", str(raw), "--upload", NAME, *at, "-f", "raw"]) == 14  # said before the conversion
    assert run(["convert", str(raw), "--for", "azure", "--upload", "glance:b", *at, "-f", "raw"]) == 12
    assert run(["convert", str(raw), str(tmp_path / "x.vhdx"), "--protected", "-f", "raw"]) == 2
    service.lies = {"os_hash_value": "0" * 128}
    assert run(["upload", str(vhdx), "glance:b", *at]) == 15
    service.faults = {("PUT", "/file"): 415}
    assert run(["upload", str(vhdx), "glance:b", *at]) == 16
    assert len(service.images) == 1


def test_a_signal_while_it_is_sent_leaves_no_image(service: FakeService, vhdx: Path) -> None:
    """It comes when all bytes are there and Glance has not answered yet."""
    deleted = threading.Event()

    def stores(data: bytes) -> bytes:
        process.terminate()
        deleted.wait(30)
        return data

    service.stores, service.deleted = stores, deleted
    command = [sys.executable, "-m", "imagekit", "upload", str(vhdx), NAME, "--glance-url", service.address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert deleted.is_set()
    assert service.images == {}
