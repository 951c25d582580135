"""What an application answers when the framework refuses a request: OpenAI's form."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from evengaze.serve.errors import ApiError
from evengaze.serve.gate import refuse


def explain_errors(app: FastAPI) -> None:
    """Have what the framework refuses answered in OpenAI's form; all else that is raised, `Gate` answers."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = max(error.errors(), key=lambda one: len(one["loc"]))  # of a field's forms, the one that went furthest
    where = [str(part) for part in found["loc"] if isinstance(part, int) or part.isidentifier()]
    where = [part for part in where if part not in ("body", "str", "text", "image_url")]
    if found["type"] == "extra_forbidden":
        text = f"the field {'.'.join(where)} is not supported"
    else:
        text = f"{'.'.join(where) or 'the request'}: {found['msg']}"
    return refuse(ApiError(400, text, param=".".join(where) or None, code=found["type"]))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = refuse(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    answer.headers.update(error.headers or {})  # of a wrong method: those that are right
    return answer
