"""A reverse proxy on 127.0.0.1 that shows another server under a path, as nginx and notebook servers do."""

import contextlib
import http.client
import http.server
import threading
from urllib.parse import urlsplit


@contextlib.contextmanager
def serve(address: str, path: str):
    """Yields (address below which `path` is the other server, list of paths asked for elsewhere, which are answered 404)."""
    target, lost = urlsplit(address), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self):
            if not self.path.startswith(path + "/"):
                lost.append(self.path)
                return self.send_error(404)
            length = int(self.headers.get("Content-Length") or 0)
            connection = http.client.HTTPConnection(target.hostname, target.port, timeout=120)
            headers = dict(self.headers) | {"X-Forwarded-Host": self.headers["Host"], "X-Forwarded-Proto": "http"}
            connection.request(self.command, self.path.removeprefix(path), self.rfile.read(length), headers)
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):  # the browser has gone
                while part := answer.read1(65536):  # events are passed on as they come
                    self.wfile.write(part)
                    self.wfile.flush()
            connection.close()

        do_GET = do_POST = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{path}/", lost
    finally:
        server.shutdown()
        server.server_close()
