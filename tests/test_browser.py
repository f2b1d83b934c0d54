"""A web page must not use, probe or pair with the bridge: a real browser tries."""

import http.client
import http.server
import json
import os
import shutil
import subprocess
import threading
import urllib.parse

import pytest
from support import start_bridge, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if os.environ.get("DVAI_TEST_ALL") != "1":
    pytest.skip("needs chromium (make test-all)", allow_module_level=True)

# What a page can send: with and without asking first (preflight), readable or blindly (no-cors).
ATTEMPTS = {
    "models": ["/v1/models", {}],
    "health": ["/v1/dvai/health", {}],
    "blind health": ["/health", {"mode": "no-cors"}],
    "capability": ["/v1/dvai/capability", {}],
    "peers": ["/v1/dvai/peers", {}],
    "pairings": ["/v1/dvai/pairings", {}],
    "chat": ["/v1/chat/completions", {"method": "POST", "headers": {"Content-Type": "application/json"}}],
    "blind chat": ["/v1/chat/completions", {"method": "POST", "mode": "no-cors"}],
    "handshake": ["/v1/dvai/handshake", {"method": "POST", "headers": {"Content-Type": "application/json"}}],
    "blind handshake": ["/v1/dvai/handshake", {"method": "POST", "mode": "no-cors"}],
    "probe": ["/v1/dvai/probe", {"method": "POST", "headers": {"Content-Type": "application/json"}}],
    "signed": ["/v1/models", {"headers": {"X-DVAI-Peer-Device-Id": "a", "X-DVAI-App-Id": "a"}}],
}
PAGE = """<!doctype html><script>
const attempts = ATTEMPTS, target = "TARGET";
const body = JSON.stringify({model: "dvai-demo", messages: [{role: "user", content: "Hi"}],
                             peerDeviceId: "page", peerDeviceName: "page", via: "lan-handshake"});
async function attempt(path, options) {
  if (options.method === "POST") options.body = body;
  try {
    const answer = await fetch(target + path, options);
    return [answer.type, answer.status, (await answer.text()).slice(0, 300)];
  } catch (error) { return ["error", 0, String(error)]; }
}
function connect() {
  return new Promise((done) => {
    const socket = new WebSocket(target.replace("http", "ws") + "/v1/dvai/tunnel", "dvai-noise.1");
    socket.onopen = () => done(["open", 0, ""]);
    socket.onerror = () => done(["error", 0, ""]);
  });
}
(async () => {
  const results = {};
  for (const [name, [path, options]] of Object.entries(attempts)) results[name] = await attempt(path, options);
  results.websocket = await connect();
  await fetch("/report", {method: "POST", body: JSON.stringify(results)});
})();
</script>"""


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page and takes its report. As a browser's proxy it stands for a name that was rebound: the page comes
    from here, everything else of that name from `bridge_port`, as it does once the name resolves to loopback."""

    daemon_threads = True

    def __init__(self, target, bridge_port):
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.page = PAGE.replace("ATTEMPTS", json.dumps(ATTEMPTS)).replace("TARGET", target)
        self.bridge_port = bridge_port
        self.report = None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class PageHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path in ("/", "/page.html"):
            self.answer(200, [("Content-Type", "text/html")], self.server.page.encode())
        elif self.path.startswith("http://evil.example"):
            self.pass_on(path, b"")
        else:
            self.answer(404, [], b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urllib.parse.urlsplit(self.path).path
        if path == "/report":
            self.server.report = json.loads(body)
            self.answer(204, [], b"")
        else:
            self.pass_on(path, body)

    def pass_on(self, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.bridge_port, timeout=20)
        connection.request(self.command, path, body or None, dict(self.headers.items()))
        answer = connection.getresponse()
        self.answer(answer.status, [("Content-Type", "application/json")], answer.read())

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def visit(tmp_path, server, url, *flags):
    """What the page at `url` reports of its attempts."""
    quiet = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet, *flags]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    browser = subprocess.Popen(
        [*command, profile, "--remote-debugging-port=0", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return wait_for(lambda: server.report, 90, "the page's report")
    finally:
        browser.kill()
        browser.wait()


def test_a_page_of_another_origin_gets_nothing(tmp_path):
    with start_bridge(tmp_path / "home", "--lan", "--host", "127.0.0.1", "--pairing", "allow") as running:
        server = PageServer(f"http://127.0.0.1:{running.port}", running.port)
        results = visit(tmp_path, server, f"http://127.0.0.1:{server.server_port}/page.html")
        server.shutdown()
        assert set(results) == {*ATTEMPTS, "websocket"}
        readable = {name: result for name, result in results.items() if result[0] not in ("error", "opaque")}
        assert not readable
        assert not any(" 200 " in line and "/health" not in line for line in running.log), running.log
        assert any("/v1/chat/completions 403" in line or "refused 403" in line for line in running.log)


def test_a_page_behind_a_rebound_name_gets_nothing(tmp_path):
    with start_bridge(tmp_path / "home", "--lan", "--host", "127.0.0.1", "--pairing", "allow") as running:
        server = PageServer("http://evil.example", running.port)
        proxy = f"--proxy-server=127.0.0.1:{server.server_port}"
        results = visit(tmp_path, server, "http://evil.example/page.html", proxy)
        server.shutdown()
        asked = {name: result for name, result in results.items() if name != "websocket"}
        assert {name: result[1] for name, result in asked.items()} == dict.fromkeys(ATTEMPTS, 403), asked
        assert results["websocket"][0] == "error"
