"""Machines of a test's own: network namespaces joined by a bridge. Needs root and iproute2."""

import contextlib
import json
import os
import secrets
import subprocess
import threading

from support import CLEAN_ENVIRON, PROGRAM

TIMEOUT_S = 60
ADDRESS = {"one": "10.77.0.1", "two": "10.77.0.2", "three": "10.77.0.3"}


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


class Lan:
    """Namespaces, by default `one` and `two`, each with an interface `lan` to a bridge in one more, `switch`."""

    def __init__(self, *shorts):
        tag = f"dvai-{os.getpid()}-{secrets.token_hex(3)}"
        self.names = {short: f"{tag}-{short}" for short in ("switch", *(shorts or ("one", "two")))}

    def create(self):
        for name in self.names.values():
            run("ip", "netns", "add", name)
        self.ip("switch", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        self.ip("switch", "link", "set", "br0", "up")
        for short in ("one", "two"):
            self.ip(short, "link", "set", "lo", "up")

    def connect(self, short, *, interface="lan", address=None):
        port = f"{short}-{interface}"
        self.ip("switch", "link", "add", port, "type", "veth", "peer", "name", interface, "netns", self.names[short])
        self.ip("switch", "link", "set", port, "master", "br0", "up")
        self.ip(short, "addr", "add", f"{address or ADDRESS[short]}/24", "dev", interface)
        self.ip(short, "link", "set", interface, "up")

    def ip(self, short, *arguments):
        return run("ip", "-n", self.names[short], *arguments)

    def exec(self, short, *command):
        return ["ip", "netns", "exec", self.names[short], *command]

    def delete(self):
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=TIMEOUT_S)


class Machine:
    """A namespace with a bridge in it, used as its owner would: by commands."""

    def __init__(self, lan, short, home):
        self.lan, self.short, self.home = lan, short, home
        self.log = open(home.with_suffix(".log"), "w+")  # noqa: SIM115 - closed with the machine
        self.process = None

    def start(self, *arguments):
        self.process = subprocess.Popen(
            self.build_command("serve", *arguments),
            env=CLEAN_ENVIRON,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), line
        self.url = line.removeprefix("listening on ").strip()
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def build_command(self, *arguments):
        words = [*PROGRAM, *arguments, "--home", self.home]
        return self.lan.exec(self.short, *map(str, words))

    def run(self, *arguments):
        return subprocess.run(
            self.build_command(*arguments), env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=90
        )

    def ask(self, body):
        """What curl prints, with the status behind it."""
        command = ["curl", "-sS", "-N", "-m", "90", "-w", "\n%{http_code}", f"{self.url}/chat/completions"]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run(self.lan.exec(self.short, *command), capture_output=True, text=True, timeout=120)
        text, _, status = done.stdout.rpartition("\n")
        return int(status), text

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(60) == 0

    def close(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        if self.process is not None:
            self.process.kill()
            self.process.stdout.close()
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        assert "Traceback" not in text, text
