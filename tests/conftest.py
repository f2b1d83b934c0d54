"""The two tiers and what each may skip: any other skip fails the run. How many processes test (of each file one of them
does all), and in which order. And the fixture of both crypto backends.

`make test` needs Python and pip only; `make test-all` (DVAI_TEST_ALL=1) skips nothing but what the system lacks.
"""

import gc
import os

import pytest
from support import require

import dvai_bridge

SKIPPED_WITHOUT_PACKAGES = {
    "needs the package cryptography",
    "needs the package gguf",
    "needs the package jinja2",
    "needs the package langchain_openai",
    "needs the package llama_cpp",
    "needs the package numpy",
    "needs the package prometheus_client",
    "needs the package python_socks",
    "needs the package qrcode",
    "needs the package redis",
    "needs the package websockets",
    "needs the templates of llama.cpp's source (DVAI_LLAMA_SOURCE)",
    "needs llama-server (DVAI_LLAMA_SERVER)",
    "needs llama.cpp's vocabularies (DVAI_LLAMA_SOURCE)",
    "needs node",
    "needs node and the npm package openai (make test-all installs them)",
    "needs chromium (make test-all)",
    "needs redis-server (make test-all)",
    "needs curl",
    "needs network namespaces (make test-all)",
    "needs the package zeroconf",
    "needs bash",
}
SKIPPED_BY_SYSTEM = {
    "finds the worker in /proc",
    "looks for tools of systems that this is not",
    "looks at process ids the POSIX way",
    "needs a file system that takes any byte in names",
    "needs a second loopback address",
    "needs IPv6 on loopback",
    "needs os.fork",
    "other systems do not enforce RLIMIT_AS",
    "POSIX file modes, links and signals",
    "POSIX links, FIFOs and limits",
}
EXPECTED = SKIPPED_BY_SYSTEM if os.environ.get("DVAI_TEST_ALL") == "1" else SKIPPED_BY_SYSTEM | SKIPPED_WITHOUT_PACKAGES

PROCESSES_AT_MOST = 8
# These come first, so that none of the processes is left alone with one at the end.
LONGEST = (
    "test_delegation_end_to_end",
    "test_relay_redis",
    "test_delegation_namespaces",
    "test_discovery_namespaces",
    "test_tools_end_to_end",
    "test_llama_engine",
    "test_peers_that_die",
    "test_end_to_end",
    "test_http_server",
)

CRYPTO_BACKENDS = {"own": dvai_bridge.OwnBackend, "cryptography": dvai_bridge.CryptographyBackend}

unexpected: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Tests wait as much as they compute."""
    return min((os.cpu_count() or 1) + 1, PROCESSES_AT_MOST)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish():
    """What was collected stays to the end, and is much: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


def note_skip(report):
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in EXPECTED:
            unexpected.add(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report):
    note_skip(report)


def pytest_collectreport(report):
    note_skip(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if unexpected and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for skip in sorted(unexpected):
        terminalreporter.write_line(f"skipped, which this tier does not expect: {skip}", red=True)


@pytest.fixture(params=CRYPTO_BACKENDS)
def crypto_backend(request):
    """Each test that takes it runs with both."""
    if request.param == "cryptography":
        require("cryptography")
    return CRYPTO_BACKENDS[request.param]()
