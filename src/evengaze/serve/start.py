"""Starts the server; says so if its packages are not installed."""

from __future__ import annotations

from evengaze.extras import require
from evengaze.serve.ports import check_free
from evengaze.serve.settings import Settings


def run(settings: Settings, host: str, port: int) -> None:
    """Serve until interrupted; requests that are being answered are finished first.

    Raises:
        MissingExtraError: the server's packages are not installed.
        EvengazeError: the model or method cannot be served, or the port is taken.
    """
    require("serve", "evengaze serve", "fastapi", "uvicorn", "prometheus_client")
    import uvicorn

    from evengaze.evaluate.predictor import Predictor
    from evengaze.serve.app import build_app
    from evengaze.serve.pruning import Methods

    check_free(host, port)
    predictor = Predictor.load(settings.spec)
    Methods(predictor, settings.method, settings.debias).try_out(settings.graphs)
    uvicorn.run(
        build_app(settings, predictor),
        host=host,
        port=port,
        log_level="info",
        timeout_graceful_shutdown=int(settings.limits.seconds) + 1,
    )
