"""A substitute for W&B's server, in this process and on the loopback interface.

It shows what the client sends, and not what the real server does with the data. Like the real
server it stores lines of history by offset: a line that is sent again at the same offset replaces
the first.
"""

import gzip
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KEY = "0123456789abcdef" * 2 + "deadbeef"
"""The API key; it has the format of real keys."""

HISTORY, SUMMARY, EVENTS, OUTPUT = (
    "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log",
)  # fmt: skip


@dataclass
class Run:
    """The data that the server has received of one run."""

    name: str
    fields: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None
    preempting: int = 0
    segments: int = 0

    @property
    def history(self):
        """The rows in the order of their offsets."""
        lines = self.files.get(HISTORY, {})
        return [json.loads(line) for _, line in sorted(lines.items())]

    @property
    def summary(self):
        lines = self.files.get(SUMMARY, {})
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def steps(self):
        return [row["_step"] for row in self.history]

    def bucket(self, entity, project):
        def tail(name):
            return json.dumps([line for _, line in sorted(self.files.get(name, {}).items())][-1:])

        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.fields.get("displayName") or self.name,
            "description": None,
            "sweepName": None,
            "config": json.dumps({key: {"value": entry} for key, entry in self.config.items()}),
            "project": {
                "id": f"p-{project}",
                "name": project,
                "entity": {"id": f"e-{entity}", "name": entity},
            },
            "historyLineCount": len(self.files.get(HISTORY, {})),
            "summaryMetrics": json.dumps(self.summary),
            "logLineCount": len(self.files.get(OUTPUT, {})),
            "eventsLineCount": len(self.files.get(EVENTS, {})),
            "historyTail": tail(HISTORY),
            "eventsTail": tail(EVENTS),
            "tags": self.fields.get("tags") or [],
            "notes": self.fields.get("notes"),
            "wandbConfig": json.dumps({"t": {"value": 1}}),
        }


class Server:
    """A server that runs inside a ``with`` block.

    Attributes:
        runs: Runs by name.
        artifacts: Artifacts by id: the variables of the request, and ``state``.
        views: Workspaces and reports by id.
        alerts: Alerts in the order of their arrival.
        requests: Methods and paths in the order of their arrival.
        refuse: Operations that get an error as response.
        deleted: Names of deleted runs, which are refused.
        silent: Whether requests get no response.
        dead: Whether connections are closed immediately.
        quota: Whether streamed rows are refused, as with an exhausted quota.
    """

    def __init__(self):
        self.runs, self.artifacts, self.views, self.blobs = {}, {}, {}, {}
        self.alerts, self.requests, self.operations, self.unknown = [], [], [], []
        self.refuse, self.deleted = set(), set()
        self.silent, self.dead, self.quota = False, False, False
        self.lock = threading.RLock()
        self._ended = threading.Event()

    def __enter__(self):
        handler = type("Bound", (Handler,), {"server_of_runs": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def wait_for(self, condition, *, seconds=30):
        """Wait until a condition is true; return False after the time limit."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.02)
        return False

    def answer(self, operation, values):
        """Return the data of the response to a GraphQL operation."""
        given = {**values, **(values.get("input") or {})}
        entity = given.get("entity") or given.get("entityName") or "loop"
        project = given.get("project") or given.get("projectName") or "uncategorized"
        answers = {
            "Viewer": lambda: {"viewer": _VIEWER},
            "ServerFeaturesQuery": lambda: {"serverInfo": {"features": []}},
            "UpsertBucket": lambda: self._upsert(given, entity, project),
            "RunResumeStatus": lambda: self._resume(given, entity, project),
            "RunStoppedStatus": lambda: {"project": {"run": {"stopped": False}}},
            "CreateRunFiles": lambda: self._files(given),
            "NotifyScriptableRunAlert": lambda: self._alert(given),
            "ArtifactType": lambda: {"project": {"artifact": None}},
            "CreateArtifact": lambda: self._create_artifact(given),
            "CreateArtifactManifest": lambda: self._manifest("create", given["artifactID"]),
            "UpdateArtifactManifest": lambda: self._manifest(
                "update", given["artifactManifestID"].removeprefix("m-")
            ),
            "CreateArtifactFiles": lambda: self._artifact_files(given["artifactFiles"]),
            "CommitArtifact": lambda: self._commit(given["artifactID"]),
            "ProjectInternalId": lambda: {
                "project": {"id": "UHJvamVjdDox", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}
            },
            "GetProjects": lambda: _projects(entity),
            "upsertView": lambda: self._view(given, entity),
            "UpsertView2": lambda: self._view(given, entity),
        }
        if operation not in answers:
            self.unknown.append((operation, values))
            return {}
        return answers[operation]()

    def _upsert(self, given, entity, project):
        name = given["name"]
        new = name not in self.runs
        run = self.runs.setdefault(name, Run(name))
        run.fields |= {key: entry for key, entry in given.items() if entry is not None}
        if given.get("config"):
            run.config = {k: entry.get("value") for k, entry in json.loads(given["config"]).items()}
        return {"upsertBucket": {"bucket": run.bucket(entity, project), "inserted": new}}

    def _resume(self, given, entity, project):
        run = self.runs.get(given["name"])
        return {
            "model": {
                "id": f"p-{project}",
                "name": project,
                "entity": {"id": f"e-{entity}", "name": entity},
                "bucket": run.bucket(entity, project) if run else None,
            }
        }

    def _files(self, given):
        run = given["run"]
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{run}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": files}}

    def _alert(self, given):
        self.alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _create_artifact(self, given):
        name = f"a{len(self.artifacts)}"
        self.artifacts[name] = {**given, "state": "PENDING"}
        sequence = {"latestArtifact": None}
        artifact = {"id": name, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _manifest(self, verb, artifact):
        file = {
            "id": "f",
            "uploadUrl": f"{self.url}/storage/manifest/{artifact}/wandb_manifest.json",
            "uploadHeaders": [],
        }
        manifest = {"artifactManifest": {"id": f"m-{artifact}", "file": file}}
        return {f"{verb}ArtifactManifest": manifest}

    def _artifact_files(self, files):
        edges = [
            {
                "node": {
                    "storagePath": "x",
                    "uploadUrl": f"{self.url}/storage/artifact/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in files
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit(self, name):
        self.artifacts[name]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": name, "digest": "d"}}}

    def _view(self, given, entity):
        name = given.get("id") or f"VmlldzoxMDA{len(self.views)}"
        self.views[name] = given
        view = {
            "id": name,
            "type": given.get("type"),
            "name": given.get("name"),
            "displayName": given.get("displayName"),
            "description": given.get("description"),
            "project": {"id": "p", "name": given.get("projectName"), "entityName": entity},
            "spec": given.get("spec"),
            "updatedAt": "2026-01-01T00:00:00Z",
        }
        return {"upsertView": {"view": view, "inserted": True}}

    def stream(self, name, content):
        """Store the streamed lines of a run."""
        run = self.runs.setdefault(name, Run(name))
        for file, part in (content.get("files") or {}).items():
            lines = run.files.setdefault(file, {})
            for index, line in enumerate(part["content"]):
                lines[0 if file == SUMMARY else part["offset"] + index] = line
        run.preempting += bool(content.get("preempting"))
        if content.get("complete") is not None:
            run.segments += 1
            run.complete, run.exit_code = content["complete"], content.get("exitcode")

    def hang(self):
        """Block a request until the server ends."""
        self._ended.wait(300)


_VIEWER = {
    "id": "u1",
    "entity": "loop",
    "username": "loop",
    "name": "loop",
    "email": "a@b.c",
    "flags": "{}",
    "admin": False,
    "teams": {"edges": []},
}


def _projects(entity):
    node = {
        "__typename": "Project",
        "id": "p-wt",
        "name": "width-transfer",
        "entityName": entity,
        "createdAt": "2026-01-01T00:00:00Z",
        "isBenchmark": False,
        "user": None,
    }
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    return {"models": {"pageInfo": page, "edges": [{"node": node}]}}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Ignore clients that closed their connections."""


class Handler(BaseHTTPRequestHandler):
    """Handles the requests of the client."""

    protocol_version = "HTTP/1.1"
    server_of_runs = None

    def log_message(self, *_):
        """Print nothing."""

    def _body(self):
        content = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return (
            gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content
        )

    def _answer(self, code, content):
        content = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _receive(self, method):
        """Return the path and the content of a request, or None if it gets no response."""
        server, path = self.server_of_runs, urllib.parse.urlparse(self.path).path
        server.requests.append(f"{method} {path}")
        if server.dead:
            self.close_connection = True
            self.connection.close()
            return None
        content = self._body()
        if server.silent:
            server.hang()
            return None
        return path, content

    def do_POST(self):
        received = self._receive("POST")
        if received is None:
            return
        path, content = received
        server = self.server_of_runs
        if path == "/graphql":
            content_json = json.loads(content)
            query = content_json.get("query", "")
            matched = re.search(r"(?:query|mutation)\s+(\w+)", query)
            operation = content_json.get("operationName") or (matched[1] if matched else "?")
            server.operations.append(operation)
            given = content_json.get("variables") or {}
            name = {**given, **(given.get("input") or {})}.get("name")
            deleted = operation == "UpsertBucket" and name in server.deleted
            if deleted or operation in server.refuse:
                self._answer(200, {"data": None, "errors": [{"message": f"no {operation}"}]})
                return
            with server.lock:
                data = server.answer(operation, given)
            self._answer(200, {"data": data})
            return
        streamed = re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
        if streamed and server.quota:
            self._answer(403, {"error": "storage quota exceeded"})
        elif streamed:
            with server.lock:
                server.stream(streamed[1], json.loads(content))
            self._answer(200, {})
        else:
            self._answer(404, {"error": "unknown"})

    def do_PUT(self):
        received = self._receive("PUT")
        if received is not None:
            name = urllib.parse.unquote(self.path.split("/storage/", 1)[1])
            self.server_of_runs.blobs[name] = received[1]
            self._answer(200, {})

    def do_GET(self):
        if self._receive("GET") is not None:
            self._answer(404, {"error": "unknown"})
