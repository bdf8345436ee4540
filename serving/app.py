"""The server as an ASGI application: which path is answered by whom, and who may ask.

Who can reach the port may ask, or, where there is a token, who knows it. A page of another site
that is open in the user's browser can reach a port of this machine too; it is refused by the Host
and Origin headers, which it cannot choose. (Its attempt to use a name of its own that resolves to
127.0.0.1 is called DNS rebinding.)
"""

import hmac
import traceback
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from serving.requests import Refusal
from serving.runs import describe_run, list_runs

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {  # the page loads nothing from elsewhere, and no other page may frame it
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
                               "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store"}
# The page asks for the token; a monitor need not know it.
OPEN = ("/", "/health")  # without a token: they tell nothing


def make_app(api, runs_folder, hosts, token):
    """Return the application. runs_folder: whose runs the page shows. hosts: names by which the
    server may be called, without the port; '*': any. token: '' where none is needed."""
    runs = Runs(runs_folder)
    # The paths.
    routes = [
        Route("/", page),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        Route("/runs", runs.list),
        Route("/runs/{name}", runs.show),
    ]
    # Who may ask, and how errors are told.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
                  Middleware(Guard, token=token)]
    handlers = {HTTPException: refuse_path, Exception: refuse_bug}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def page(request):
    return HTMLResponse(PAGE.read_text("utf-8"), headers=PAGE_HEADERS)


class Runs:
    """The endpoints of the runs view. They are plain functions: Starlette runs them in threads."""

    def __init__(self, folder):
        self.folder = folder

    def list(self, request):
        return JSONResponse(list_runs(self.folder))

    def show(self, request):
        # Starlette has decoded the name; describe_run knows what may be read.
        run = describe_run(self.folder, request.path_params["name"])
        if run is None:
            return Refusal("there is no such run", status=404).response()
        return JSONResponse(run)


async def refuse_path(request, error):
    """Answer a request for an unknown path, or by a method that it has not."""
    return Refusal(f"{request.method} {request.url.path:.100}: {error.detail}",
                   status=error.status_code).response()


async def refuse_bug(request, error):
    """Answer a request in which we failed."""
    traceback.print_exception(error)
    return Refusal("a bug of the server; its standard error has the traceback",
                   status=500).response()


class Guard:
    """Refuses requests of other sites' pages, and those without the token."""

    def __init__(self, app, token):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send):
        # The application answers, or the refusal in its place.
        answer = self.app
        if scope["type"] == "http":
            refusal = self.find_fault(Headers(scope=scope), scope["path"])
            if refusal:
                answer = refusal.response()
        await answer(scope, receive, send)

    def find_fault(self, headers, path):
        """Return the Refusal of a request with these headers, None where it may go on."""
        # Browsers say which page asks.
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return Refusal("a page of another site may not use this server", status=403)
        # compare_digest takes the same time wherever the two differ.
        if self.token and path not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), self.token.encode()):
                return Refusal("wrong or missing token; send it as Authorization: Bearer TOKEN",
                               status=401, code="invalid_api_key")
        return None
