"""What is told about a disk's readiness for Hyper-V, on file systems that mke2fs made; unknown is said as unknown."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

import imagekit
from imagekit import api
from imagekit.cli.app import run
from imagekit.contents.initramfs import InitramfsError, names
from imagekit.contents.readiness import Readiness
from imagekit.errors import UnsupportedFeature
from tests.cloudinit_specs import KEY
from tests.ext_disks import UUID, make_disk, make_ext

pytestmark = pytest.mark.oracle

RELEASE = "6.1.0-1-cloud-amd64"
MODULES = ("hv/hv_vmbus.ko", "scsi/hv_storvsc.ko", "net/hyperv/hv_netvsc.ko")
Pack = Callable[[bytes], bytes]


def cpio(files: list[str]) -> bytes:
    """A newc archive of small files."""
    archive = b""
    for name in [*files, "TRAILER!!!"]:
        data = b"" if name == "TRAILER!!!" else b"content"
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        entry = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        entry += bytes(-len(entry) % 4)
        archive += entry + data + bytes(-len(data) % 4)
    return archive


def zstd(data: bytes) -> bytes:
    from imagekit.contents.initramfs import _zstd_module

    packed: bytes = _zstd_module().compress(data)
    return packed


def system(folder: Path, *, initramfs: bytes | None, root: str = "LABEL=root") -> Path:
    """The files of a small Linux, as far as the check looks at them."""
    tree = folder / "tree"
    for name in ("boot/grub", "etc/cloud/cloud.cfg.d", f"lib/modules/{RELEASE}"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "etc/os-release").write_text('NAME=x\nPRETTY_NAME="Small Linux 1"\n')
    (tree / "etc/fstab").write_text(f"# comment\n{root} / ext4 defaults 0 1\n")
    (tree / "etc/cloud/cloud.cfg").write_text("users:\n - default\n")
    (tree / f"boot/vmlinuz-{RELEASE}").write_bytes(b"MZ")
    (tree / f"boot/config-{RELEASE}").write_text("CONFIG_HYPERV=m\nCONFIG_HYPERV_STORAGE=m\nCONFIG_HYPERV_NET=m\n")
    depends = "".join(f"kernel/drivers/{one}.xz:\n" for one in MODULES)
    (tree / f"lib/modules/{RELEASE}/modules.dep").write_text(depends)
    menu = f"menuentry 'Small' {{\n\tlinux /boot/vmlinuz-{RELEASE} root={root} ro\n}}\n"
    (tree / "boot/grub/grub.cfg").write_text(menu)
    if initramfs is not None:
        (tree / f"boot/initrd.img-{RELEASE}").write_bytes(initramfs)
    return tree


def look(folder: Path, tree: Path) -> Readiness:
    return api.readiness(make_disk(make_ext(tree, folder / "fs.raw"), folder / "disk.raw"), format="raw")


def statuses(found: Readiness) -> dict[str, str]:
    return {check.name.split()[0]: check.status for check in found.checks}


GOOD = cpio([f"usr/lib/modules/{RELEASE}/kernel/drivers/{one}.zst" for one in MODULES])


@pytest.mark.parametrize(
    "pack",
    [bytes, gzip.compress, lzma.compress, zstd, lambda data: cpio(["early"]) + bytes(512) + gzip.compress(data)],
    ids=["plain", "gzip", "xz", "zstd", "early-microcode"],
)
def test_a_guest_with_its_drivers_in_the_initramfs_is_ready(tmp_path: Path, pack: Pack) -> None:
    found = look(tmp_path, system(tmp_path, initramfs=pack(GOOD)))
    assert found.generations == (1,)
    assert not found.failed
    assert statuses(found) == {
        "partition-table": "ok",
        "generation-1": "ok",
        "generation-2": "warning",
        "root-file-system": "ok",
        "kernel": "ok",
        "cloud-init": "ok",
        "fstab": "ok",
        "kernel-command-line": "ok",
    }


def test_a_guest_without_storvsc_in_its_initramfs_has_failed(tmp_path: Path) -> None:
    found = look(tmp_path, system(tmp_path, initramfs=gzip.compress(cpio(["a/hv_vmbus.ko", "a/virtio_blk.ko"]))))
    (failed,) = found.failed
    assert failed.name == f"kernel {RELEASE}"
    assert failed.detail.startswith(f"hv_storvsc is not in initrd.img-{RELEASE}")


def test_drivers_in_the_kernel_need_no_initramfs(tmp_path: Path) -> None:
    tree = system(tmp_path, initramfs=None)
    assert statuses(look(tmp_path, tree))["kernel"] == "failed"
    (tree / f"boot/config-{RELEASE}").write_text("CONFIG_HYPERV=y\nCONFIG_HYPERV_STORAGE=y\nCONFIG_HYPERV_NET=m\n")
    assert statuses(look(tmp_path, tree))["kernel"] == "ok"


def test_a_kernel_made_without_hyper_v_has_failed(tmp_path: Path) -> None:
    tree = system(tmp_path, initramfs=GOOD)
    (tree / f"boot/config-{RELEASE}").write_text("CONFIG_HYPERV is not set\n")
    (tree / f"lib/modules/{RELEASE}/modules.dep").write_text("kernel/drivers/block/virtio_blk.ko:\n")
    (failed,) = look(tmp_path, tree).failed
    assert "without hv_vmbus, hv_storvsc, hv_netvsc" in failed.detail


@pytest.mark.parametrize("packed", [b"\x02\x21\x4c\x18" + b"lz4", gzip.compress(GOOD)[:-40], b"what is this"])
def test_an_initramfs_that_cannot_be_read_is_unknown_not_failed(tmp_path: Path, packed: bytes) -> None:
    found = look(tmp_path, system(tmp_path, initramfs=packed))
    assert statuses(found)["kernel"] == "unknown"
    assert not found.failed


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("datasource_list: [ ConfigDrive, None ]\n", "ok"),
        ("datasource_list:\n  - NoCloud\n  - None\n", "ok"),
        ("datasource_list: ['Ec2', \"None\"]\n", "failed"),
        ("datasource:\n  Ec2: {}\n", "ok"),
    ],
)
def test_cloud_init_must_look_at_our_drive(tmp_path: Path, text: str, status: str) -> None:
    tree = system(tmp_path, initramfs=GOOD)
    (tree / "etc/cloud/cloud.cfg.d/90_x.cfg").write_text(text)
    assert statuses(look(tmp_path, tree))["cloud-init"] == status


@pytest.mark.parametrize(
    ("root", "status"),
    [
        ("/dev/vda1", "failed"),
        ("/dev/xvda", "failed"),
        ("/dev/sda1", "warning"),
        (f"UUID={UUID}", "ok"),
        ("UUID=99999999-7a1c-4d6e-9d6b-0c1d2e3f4a5b", "warning"),
        ("/dev/mapper/vg-root", "ok"),
    ],
)
def test_disks_named_as_another_hypervisor_names_them_have_failed(tmp_path: Path, root: str, status: str) -> None:
    found = statuses(look(tmp_path, system(tmp_path, initramfs=GOOD, root=root)))
    assert (found["fstab"], found["kernel-command-line"]) == (status, status)


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    xfs = tmp_path / "fs.raw"
    xfs.write_bytes(b"XFSB" + bytes((40 << 20) - 4))
    found = api.readiness(make_disk(xfs, tmp_path / "disk.raw"), format="raw")
    assert statuses(found)["root-file-system"] == "unknown"
    assert "xfs, which is not read here" in next(one.detail for one in found.checks if one.status == "unknown")
    assert not found.failed


def test_a_disk_that_nothing_can_boot_has_failed(tmp_path: Path) -> None:
    disk = make_disk(
        make_ext(system(tmp_path, initramfs=GOOD), tmp_path / "fs.raw"), tmp_path / "d.raw", boot_code=False
    )
    found = api.readiness(disk, format="raw")
    assert found.generations == ()
    assert [check.name for check in found.failed] == ["boot-loader"]


def test_info_shows_it_and_strict_prepare_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = system(tmp_path, initramfs=cpio(["nothing"]))
    disk = make_disk(make_ext(tree, tmp_path / "fs.raw"), tmp_path / "disk.raw")
    assert run(["info", str(disk), "--format", "raw", "--hyperv", "--output", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["hyperv"]
    assert shown["generations"] == [1]
    assert [check["name"] for check in shown["checks"] if check["status"] == "failed"] == [f"kernel {RELEASE}"]
    assert run(["info", str(disk), "--format", "raw", "--hyperv"]) == 0
    assert "hv_vmbus, hv_storvsc is not in initrd.img" in capsys.readouterr().out
    bundle = imagekit.prepare(disk, tmp_path / "bundle", source_format="raw", name="web1")
    assert any(warning.startswith("not ready for Hyper-V: kernel") for warning in bundle.warnings)
    with pytest.raises(UnsupportedFeature, match="not ready for Hyper-V"):
        imagekit.prepare(disk, tmp_path / "strict", source_format="raw", name="web1", ssh_keys=[KEY], strict=True)
    assert not (tmp_path / "strict").exists()


def test_an_initramfs_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagekit.contents.initramfs.MAX_UNPACKED", 1 << 20)
    with pytest.raises(InitramfsError, match="more than"):
        list(names(gzip.compress(cpio(["a"]) + bytes(8 << 20))))
    monkeypatch.setattr("imagekit.contents.initramfs.MAX_FILES", 10)
    with pytest.raises(InitramfsError, match="more than 10 files"):
        list(names(cpio([str(number) for number in range(11)])))
