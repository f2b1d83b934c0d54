#!/usr/bin/env bash
# Everything that `make test` leaves out: the packages and programs that the tests compare us with.
# What is slow to build is kept in DVAI_TEST_CACHE between runs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CACHE=${DVAI_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dvai-bridge-tests}
LLAMA_VERSION=0.3.36
TAG=$("$PYTHON" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
VENV=$CACHE/venv-$TAG-llama-$LLAMA_VERSION
SOURCE=$CACHE/llama-cpp-python-$LLAMA_VERSION
LLAMA_SERVER=$CACHE/llama-server-build/bin/llama-server
NODE=$CACHE/node

say() { printf '\n== %s\n' "$*"; }

install_programs() {
    local missing=()
    for program in curl openssl cmake; do command -v $program >/dev/null || missing+=($program); done
    for pair in node:nodejs npm:npm ip:iproute2 nft:nftables chromium:chromium avahi-daemon:avahi-daemon \
        avahi-browse:avahi-utils dbus-daemon:dbus redis-server:redis-server; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    if ((${#missing[@]})); then
        say "installing ${missing[*]}"
        apt-get update -qq && apt-get install -qq -y "${missing[@]}"
    fi
}

build_llama() {
    [ -e "$VENV/llama-ready" ] && return
    say "building llama-cpp-python $LLAMA_VERSION (about 4 minutes, once)"
    mkdir -p "$CACHE/source"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/pip" --quiet download --no-deps --no-binary llama-cpp-python \
        "llama-cpp-python==$LLAMA_VERSION" -d "$CACHE/source"
    mkdir -p "$SOURCE"
    tar -xf "$CACHE/source/llama_cpp_python-$LLAMA_VERSION.tar.gz" -C "$SOURCE" --strip-components=1
    CMAKE_ARGS="-DGGML_NATIVE=OFF" "$VENV/bin/pip" --quiet install "$CACHE/source/llama_cpp_python-$LLAMA_VERSION.tar.gz"
    touch "$VENV/llama-ready"
}

build_llama_server() {
    [ -x "$LLAMA_SERVER" ] && return
    say "building llama-server from the same source (several minutes, once)"
    cmake -S "$SOURCE/vendor/llama.cpp" -B "$CACHE/llama-server-build" \
        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF >/dev/null
    cmake --build "$CACHE/llama-server-build" --target llama-server --parallel >/dev/null
}

install_clients() {
    say "installing Python and npm clients"
    "$VENV/bin/pip" --quiet install -r tests/requirements-all.txt
    mkdir -p "$NODE"
    [ -d "$NODE/node_modules/openai" ] || npm --prefix "$NODE" --silent --no-audit --no-fund install openai
}

test_other_pythons() {
    local seen=" $TAG " candidate tag
    for candidate in python3.11 python3.12 python3.13 "$HOME"/.pyenv/versions/3.1[1-9].*/bin/python3; do
        tag=$("$candidate" -c 'import sys; print("py%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        [[ $seen == *" $tag "* ]] && continue
        seen+="$tag "
        say "make test with $candidate ($tag)"
        make --no-print-directory test PYTHON="$candidate"
    done
}

install_programs
build_llama
build_llama_server
install_clients
say "all tests with $("$VENV/bin/python" --version)"
DVAI_TEST_ALL=1 DVAI_LLAMA_SOURCE=$SOURCE DVAI_LLAMA_SERVER=$LLAMA_SERVER DVAI_NODE_MODULES=$NODE/node_modules \
    "$VENV/bin/python" -m pytest tests --durations=12 --tb=short -n auto --dist loadfile --no-loadscope-reorder
test_other_pythons
