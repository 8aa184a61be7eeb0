#!/usr/bin/env bash
# venv.sh DIR [PYTHON]: a virtual environment with the pinned dependencies and imagekit itself, installed editable.
# Redone only when the checkout moved, or pyproject.toml, the pins or PYTHON changed; silent otherwise.
set -euo pipefail
cd -P "$(dirname "$0")/.."
dir=$(realpath -m "$1")
wanted=${2:-}
stamp=$dir/imagekit-stamp

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# What is there serves if it runs, lies where it was made, and is of the interpreter asked for.
usable() {
    local have
    have=$(version "$dir/bin/python") || return 1
    grep -qsF "$dir" "$dir/bin/activate" || return 1
    [ -z "$wanted" ] || [ "$have" = "$(version "$wanted")" ]
}

# An interpreter that was named is the one or none; otherwise the first that is new enough.
interpreter() {
    local name found
    for name in ${wanted:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if recent "$name"; then
            command -v "$name"
            return
        fi
    done
    name=${wanted:-python3}
    found=$(version "$name") || found="not an interpreter that runs"
    die "imagekit needs Python 3.10 or newer; $name is $found." \
        "Name another: make PYTHON=/path/to/python3.11 …"
}

make_environment() {
    local python package
    [ -n "$wanted" ] || command -v python3 >/dev/null || scripts/apt.sh python3 python3-venv || true
    python=$(interpreter)
    # Debian splits ensurepip off into a package of its own.
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        scripts/apt.sh "$package" || die "$python lacks the module ensurepip, so it cannot make an environment." \
            "On Debian or Ubuntu: sudo apt-get install $package"
    fi
    echo "Making $1 with $python ($(version "$python"))"
    "$python" -m venv --clear "$dir"
}

state() { cat pyproject.toml requirements/dev.txt | cksum; }

if usable; then
    [ "$(cat "$stamp" 2>/dev/null)" != "$(state)" ] || exit 0
else
    make_environment "$1"
fi
rm -f "$stamp"
echo "Installing the pinned dependencies (requirements/dev.txt) and imagekit itself into $1"
pip=("$dir/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" -r requirements/dev.txt
"${pip[@]}" --no-deps --no-build-isolation -e .
# As pip does for what is not editable: every start would compile the modules anew where byte code is not written.
"$dir/bin/python" -m compileall -q imagekit formats cloudinit
state >"$stamp"
