"""Machines of a test's own: network namespaces joined by a bridge. Needs root and iproute2."""

import os
import secrets
import subprocess

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
