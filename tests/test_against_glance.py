"""The real Glance 33: images from it and to it, its refusals, and our import plugin inside it.

tests/oracles/glance.py starts it, once for all tests here, with the plugin; plugins run for imports only. What a test
uploads has a name of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures.qcow2_images import Plain, Recipe, make
from imagekit.cli.app import run
from imagekit.formats.base import GiB, MiB
from imagekit.launch.tiny_guest import write_tiny_guest
from imagekit.progress import Progress
from tests.disks import noise
from tests.keystone import CREDENTIAL, PASSWORD, PROJECT, SECRET, USER, Keystone, keystone
from tests.oracles import need_tool
from tests.oracles.glance import ROOT, RealGlance, real_glance
from tests.web import serve

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

SETTINGS = """
[imagekit_conversion]
limit_virtual_size = 17179869184
pass_through = iso
"""
PATTERN = noise(65536, 7)


@pytest.fixture(scope="module")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealGlance]:
    folder = tmp_path_factory.mktemp("glance")
    with real_glance(folder, plugins=("imagekit",), settings=SETTINGS) as started:
        yield started


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny guest, as qemu-img compresses it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_guest(folder / "tiny.raw")
    command = [need_tool("qemu-img"), "convert", "-c", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*command, folder / "tiny.raw", folder / "tiny.qcow2"], check=True)
    return folder / "tiny.qcow2"


def cli(glance: RealGlance, *arguments: str | Path) -> int:
    return run([*map(str, arguments), "--glance-url", glance.url, "--no-sync"])


def test_an_image_becomes_a_bundle_that_boots(
    glance: RealGlance, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By id and by name, with its least of disk and memory; the guest itself checks its disk and finds its drive."""
    need_tool("qemu-system-x86_64")
    stated = {"hw_machine_type": "hyperv-gen1", "min_disk": 1, "min_ram": 2100, "os_secure_boot": "disabled"}
    made = glance.upload(tiny.read_bytes(), name="boots", disk_format="qcow2", **stated)
    bundle = tmp_path / "bundle"
    assert cli(glance, "prepare", f"glance:{made}", "--out", bundle, "--output", "json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reasons"]["generation"] == "Glance states hw_machine_type=hyperv-gen1"
    assert (said["machine"]["name"], said["machine"]["memory"]) == ("boots", 2100 * MiB)
    assert said["conversion"]["target"]["virtual-size"] == GiB
    result = imagekit.boot(bundle, accelerator="tcg", timeout=120)
    assert result.verdict == "booted"
    assert cli(glance, "convert", "glance:boots", tmp_path / "boots.vhdx") == 0


def test_what_is_sent_to_glance_comes_back_the_same(
    glance: RealGlance, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every format that Glance takes; the properties that a look at the disk gave; protected at the end."""
    for target in ("vhd", "vhdx", "qcow2", "raw"):
        path = tmp_path / f"tiny.{target}"
        imagekit.convert(tiny, path, sync=False)
        upload = ["upload", path, f"glance:sent-{target}", "-f", target, "--protected", "--output", "json"]
        assert run([*map(str, upload), "--glance-url", glance.url]) == 0
        made = json.loads(capsys.readouterr().out)
        stated = glance.show(made["id"])
        assert (stated["status"], stated["disk_format"], stated["protected"]) == ("active", target, True)
        assert (stated["hw_machine_type"], stated["min_disk"]) == ("hyperv-gen1", 1)
        assert stated["os_hash_value"] == made["digest"]["value"]
        assert glance.stored(made["id"]) == path.read_bytes()
        assert run(["compare", f"glance:sent-{target}", str(tiny), "--glance-url", glance.url]) == 0
        capsys.readouterr()


def test_convert_uploads_in_one_go(glance: RealGlance, tiny: Path, tmp_path: Path) -> None:
    assert cli(glance, "convert", tiny, "--upload", "glance:in-one-go", "--property", "os_distro=tiny") == 0
    assert cli(glance, "convert", "glance:in-one-go", tmp_path / "back.raw") == 0
    assert run(["compare", str(tmp_path / "back.raw"), str(tiny), "-f", "raw"]) == 0


def test_a_fixed_vhd_is_refused_by_glance_as_we_say(
    glance: RealGlance, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours says so beforehand; tried all the same, Glance answers 415 and no image is left."""
    path, before = tmp_path / "fixed.vhd", glance.ids()
    imagekit.convert(tiny, path, subformat="fixed", sync=False)
    at = ["--glance-url", glance.url]
    assert run(["upload", str(path), "glance:fixed", *at]) == 12
    assert "415" in capsys.readouterr().err
    assert run(["upload", str(path), "glance:fixed", "--disk-format", "vhd", *at]) == 16
    assert "Glance answered 415" in capsys.readouterr().err
    assert glance.ids() == before
    assert run(["upload", str(path), "glance:fixed", "--disk-format", "raw", *at]) == 0
    assert run(["info", "glance:fixed", "-f", "vhd", *at]) == 0


def test_bytes_that_are_not_those_of_the_hash_end_with_15(
    glance: RealGlance, tiny: Path, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit flips in the store, behind Glance's back."""
    made = glance.upload(tiny.read_bytes(), name="flipped", disk_format="qcow2")
    stored = glance.folder / "images" / made
    data = bytearray(stored.read_bytes())
    data[-1000] ^= 1
    stored.write_bytes(data)
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "disk.vhdx") == 15
    assert cli(glance, "prepare", f"glance:{made}", "--out", no_leftovers / "bundle") == 15
    assert "its sha512 is" in capsys.readouterr().err


def test_an_image_deleted_while_it_is_fetched_ends_with_10(glance: RealGlance, no_leftovers: Path) -> None:
    """The first answer of the file deletes the image, whose other ranges are then gone."""
    data = make(Recipe(size=64 * MiB, clusters={number: Plain(PATTERN) for number in range(1000)})).data
    made = glance.upload(data, name="deleted", disk_format="qcow2")
    deleted = threading.Event()

    def told(progress: Progress) -> None:
        if progress.phase == "download" and progress.done and not deleted.is_set():
            deleted.set()
            assert glance.call("DELETE", f"/v2/images/{made}")[0] == 204

    with pytest.raises(imagekit.ImagekitError) as caught:
        imagekit.convert(f"glance:{made}", no_leftovers / "disk.vhdx", glance_url=glance.url, progress=told)
    assert deleted.is_set()
    assert caught.value.exit_code == 10, caught.value


@pytest.mark.parametrize("stated", ["raw", "iso"])
def test_content_in_another_format_than_stated_is_refused(
    glance: RealGlance, tiny: Path, no_leftovers: Path, stated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Glance takes a qcow2 for raw; we do not (13). What is stated to be no disk is not even fetched (12)."""
    data = tiny.read_bytes() if stated == "raw" else bytes(32769) + b"CD001" + bytes(60000)
    made = glance.upload(data, name=f"wrong-{stated}", disk_format=stated)
    expected = {"raw": 13, "iso": 12}[stated]
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "disk.vhdx") == expected
    assert cli(glance, "prepare", f"glance:{made}", "--out", no_leftovers / "bundle") == expected
    if stated == "raw":
        assert "format-mismatch" in capsys.readouterr().err


def bomb() -> bytes:
    """A qcow2 of 2 MiB that claims 8 GiB of data, all of it in one cluster."""
    tables = 8 * GiB // 65536 // 8192
    made = make(Recipe(size=8 * GiB, clusters={number * 8192: Plain(PATTERN) for number in range(tables)}))
    data, entry = bytearray(made.data), made.data[made.l2_entry(0) :][:8]
    for number in range(tables):
        at = made.l2_entry(number * 8192)
        data[at : at + 65536] = entry * 8192
    return bytes(data)


def test_a_bomb_ends_with_13(glance: RealGlance, no_leftovers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = glance.upload(bomb(), name="bomb", disk_format="qcow2")
    assert glance.show(made)["virtual_size"] == 8 * GiB
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "disk.vhdx") == 13
    assert cli(glance, "prepare", f"glance:{made}", "--out", no_leftovers / "bundle") == 13
    said = capsys.readouterr().err
    assert "amplification" in said
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "a.vhdx", "--limit-virtual-size", "1G") == 13


# --- the import plugin -------------------------------------------------------------------------------------------


def test_the_plugin_makes_a_vhdx_of_a_staged_qcow2(glance: RealGlance, tiny: Path, tmp_path: Path) -> None:
    """glance-direct. What the user stated stays, what nobody stated is found on the disk."""
    made = glance.create(name="direct", disk_format="qcow2", os_type="other")
    glance.begin_import(made, staged=tiny.read_bytes())
    found = glance.imported(made)
    assert (found["status"], found["disk_format"], found["container_format"]) == ("active", "vhdx", "bare")
    assert (found["virtual_size"], found["hw_machine_type"]) == (64 * MiB, "hyperv-gen1")
    assert found["os_type"] == "other"
    stored = glance.stored(made)
    assert found["size"] == len(stored)
    (tmp_path / "stored.vhdx").write_bytes(stored)
    compare = [need_tool("qemu-img"), "compare", "-f", "vhdx", "-F", "qcow2"]
    assert subprocess.run([*compare, tmp_path / "stored.vhdx", tiny]).returncode == 0
    assert list((glance.folder / "staging").iterdir()) == []
    assert run(["compare", f"glance:{made}", str(tiny), "--glance-url", glance.url]) == 0


def test_the_plugin_makes_a_vhdx_of_a_download(glance: RealGlance, tiny: Path) -> None:
    made = glance.create(name="downloaded", disk_format="qcow2")
    with serve(tiny.read_bytes()) as site:
        glance.begin_import(made, uri=site.url)
        found = glance.imported(made)
    assert (found["status"], found["disk_format"]) == ("active", "vhdx")
    assert list((glance.folder / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("bomb", "amplification"),
        ("backing", "backing-file"),
        ("stated raw", "format-mismatch"),
        ("torn", "imagekit: "),
        ("too large", "limit-virtual-size"),
        ("ami", "container format ami"),
    ],
)
def test_the_plugin_fails_closed(glance: RealGlance, tiny: Path, what: str, said: str) -> None:
    """The image is queued again, says why, and nothing of it is staged or stored."""
    data = {
        "bomb": bomb(),
        "backing": make(Recipe(size=MiB, backing="/etc/passwd")).data,
        "stated raw": tiny.read_bytes(),
        "torn": tiny.read_bytes()[:20000],
        "too large": make(Recipe(size=17 * GiB)).data,
        "ami": bytes(MiB),
    }[what]
    disk_format = {"stated raw": "raw", "ami": "ami"}.get(what, "qcow2")
    container = "ami" if what == "ami" else "bare"
    made = glance.create(name=f"closed-{what}", disk_format=disk_format, container_format=container)
    glance.begin_import(made, staged=data)
    found = glance.imported(made)
    assert found["status"] == "queued"
    assert said in glance.log()
    assert list((glance.folder / "staging").iterdir()) == []
    assert not (glance.folder / "images" / made).exists()


def test_a_download_that_is_refused_can_be_tried_again(glance: RealGlance, tiny: Path) -> None:
    """Every step of it was undone, Glance's lock on the image as well."""
    made = glance.create(name="again", disk_format="qcow2")
    with serve(bomb()) as site:
        glance.begin_import(made, uri=site.url)
        assert glance.imported(made)["status"] == "queued"
    assert list((glance.folder / "staging").iterdir()) == []
    with serve(tiny.read_bytes()) as site:
        glance.begin_import(made, uri=site.url)
        found = glance.imported(made)
    assert (found["status"], found["disk_format"]) == ("active", "vhdx")


def test_the_plugin_passes_only_what_the_operator_lists(glance: RealGlance) -> None:
    data = bytes(32769) + b"CD001" + bytes(60000)
    made = glance.create(name="an-iso", disk_format="iso")
    glance.begin_import(made, staged=data)
    assert (glance.imported(made)["status"], glance.stored(made)) == ("active", data)


# --- through openstacksdk ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cloud:
    """The command line where openstacksdk is installed, with clouds.yaml and variables of its own."""

    glance: RealGlance
    identity: Keystone
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def write(self, **clouds: dict[str, Any]) -> None:
        (self.folder / "clouds.yaml").write_text(json.dumps({"clouds": clouds}))

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
        places = {"HOME": str(self.folder), "PYTHONPATH": str(ROOT), **self.variables}
        return subprocess.run(
            [self.glance.python, "-m", "imagekit", *map(str, arguments)],
            cwd=self.folder,
            env={**kept, **places},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def cloud(glance: RealGlance, tmp_path: Path) -> Iterator[Cloud]:
    """Its tokens are of the project ``web``: what is found in there was found with one."""
    tokens: dict[str, str] = {"an-admins": PROJECT, "notused": "open"}  # keystoneauth's word for no token
    glance.admit(tokens)

    def issued(token: str) -> None:
        tokens[token] = PROJECT
        glance.admit(tokens)

    with keystone(glance.url, issued) as identity:
        yield Cloud(glance, identity, tmp_path)


def password(cloud: Cloud, **more: str) -> dict[str, Any]:
    auth = {"auth_url": cloud.identity.url, "username": USER, "password": PASSWORD, "project_name": PROJECT}
    return {"auth": {**auth, "user_domain_id": "default", "project_domain_id": "default", **more}}


def test_the_sdk_logs_in_by_password_uploads_and_converts(cloud: Cloud, tiny: Path) -> None:
    """Each question and each range carries the token: to the project ``open`` the image does not exist."""
    cloud.write(mine=password(cloud))
    sent = cloud.run("convert", tiny, "--upload", "glance:by-password", "--os-cloud", "mine", "--output", "json")
    assert sent.returncode == 0, sent.stderr
    made = json.loads(sent.stdout)["upload"]["id"]
    assert made not in cloud.glance.ids()
    cloud.variables["OS_CLOUD"] = "mine"
    for name in (made, "by-password"):
        done = cloud.run("convert", f"glance:{name}", f"{name}.raw")
        assert done.returncode == 0, done.stderr
        assert run(["compare", str(cloud.folder / f"{name}.raw"), str(tiny), "-f", "raw"]) == 0
    assert cloud.identity.logins == ["password"] * 3


def test_a_token_that_expires_meanwhile_is_renewed(cloud: Cloud, tiny: Path) -> None:
    """Each is over when it comes: the questions and the ranges log in anew."""
    cloud.identity.lifetime = "2020-01-01T00:00:00.000000Z"
    cloud.write(mine=password(cloud))
    assert cloud.run("upload", tiny, "glance:short-lived", "--os-cloud", "mine").returncode == 0
    before = len(cloud.identity.logins)
    done = cloud.run("convert", "glance:short-lived", "disk.vhdx", "--os-cloud", "mine")
    assert done.returncode == 0, done.stderr
    assert len(cloud.identity.logins) - before >= 3


def test_the_sdk_takes_an_application_credential(cloud: Cloud, tiny: Path) -> None:
    auth = {
        "auth_url": cloud.identity.url,
        "application_credential_id": CREDENTIAL,
        "application_credential_secret": SECRET,
    }
    cloud.write(mine={"auth_type": "v3applicationcredential", "auth": auth})
    done = cloud.run("upload", tiny, "glance:by-credential", "--os-cloud", "mine")
    assert done.returncode == 0, done.stderr
    assert cloud.identity.logins == ["application_credential"]


def test_the_sdk_takes_variables(cloud: Cloud, tiny: Path) -> None:
    given = password(cloud)["auth"]
    cloud.variables.update({f"OS_{name.upper()}": value for name, value in given.items()})
    done = cloud.run("upload", tiny, "glance:by-variables")
    assert done.returncode == 0, done.stderr
    assert cloud.run("info", "glance:by-variables").returncode == 0
    assert cloud.identity.logins == ["password", "password"]


@pytest.mark.parametrize("auth_type", ["none", "admin_token"])
def test_the_sdk_needs_no_keystone(cloud: Cloud, tiny: Path, auth_type: str) -> None:
    """``none`` is the project without a token, ``admin_token`` one that is known to Glance."""
    auth = {"endpoint": cloud.glance.url, **({} if auth_type == "none" else {"token": "an-admins"})}
    cloud.write(bare={"auth_type": auth_type, "auth": auth, "image_endpoint_override": cloud.glance.url})
    done = cloud.run("upload", tiny, f"glance:by-{auth_type}", "--os-cloud", "bare", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["id"] in cloud.glance.ids()) == (auth_type == "none")
    assert cloud.run("info", f"glance:by-{auth_type}", "--os-cloud", "bare").returncode == 0
    assert cloud.identity.logins == []


def test_who_cannot_log_in_is_told_so_without_the_secret(cloud: Cloud) -> None:
    cloud.write(
        wrong=password(cloud, password="wrong horse"),
        nowhere=password(cloud, auth_url="http://127.0.0.1:9/v3"),
        revoked={
            "auth_type": "admin_token",
            "auth": {"endpoint": cloud.glance.url, "token": "a-revoked-one"},
            "image_endpoint_override": cloud.glance.url,
        },
    )
    for name in ("wrong", "nowhere", "revoked", "unknown"):
        done = cloud.run("info", "glance:x", "--os-cloud", name, "--debug")
        assert done.returncode == 16, (name, done.stderr)
        assert "imagekit: " in done.stderr
        said = done.stdout + done.stderr
        assert not any(secret in said for secret in ("wrong horse", PASSWORD, "a-revoked-one"))
