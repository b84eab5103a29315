import { HTTPException } from "hono/http-exception";
import type { ContentfulStatusCode } from "hono/utils/http-status";
import { z } from "zod";
import { ChatTemplateError, TokenizerError } from "../../model/mod.ts";
import { ClusterError, ContextLengthError, LoadingError, QueueFullError, RequestError } from "../errors.ts";

/** The error object of OpenAI's API. */
export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: string | null };
}

/** An error as the API tells it. */
export class ApiError extends Error {
  override readonly name = "ApiError";
  readonly status: ContentfulStatusCode;
  readonly type: string;
  readonly param: string | null;
  readonly code: string | null;
  readonly headers: Readonly<Record<string, string>>;

  constructor(
    status: ContentfulStatusCode,
    message: string,
    details: { type?: string; param?: string; code?: string; headers?: Record<string, string>; cause?: unknown } = {},
  ) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.status = status;
    this.type = details.type ?? (status < 500 ? "invalid_request_error" : "server_error");
    this.param = details.param ?? null;
    this.code = details.code ?? null;
    this.headers = details.headers ?? {};
  }

  get body(): ErrorBody {
    const { message, type, param, code } = this;
    return { error: { message, type, param, code } };
  }
}

/** Any error as one of the API's. What is not meant for clients becomes a plain 500. */
export function toApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error;
  if (error instanceof z.ZodError) {
    const issue = error.issues[0]!;
    const param = issue.path.join(".");
    return new ApiError(400, `${param === "" ? "body" : param}: ${issue.message}`, { param, cause: error });
  }
  if (error instanceof ContextLengthError) {
    return new ApiError(400, error.message, { code: "context_length_exceeded", cause: error });
  }
  if (error instanceof RequestError || error instanceof ChatTemplateError || error instanceof TokenizerError) {
    return new ApiError(400, error.message, { cause: error });
  }
  if (error instanceof QueueFullError) {
    return new ApiError(429, error.message, {
      type: "rate_limit_error",
      code: "queue_full",
      headers: { "retry-after": "1" },
      cause: error,
    });
  }
  if (error instanceof LoadingError) {
    const seconds = Math.min(60, Math.max(2, Math.ceil((error.etaMs ?? 0) / 1000)));
    return new ApiError(503, error.message, {
      code: "model_loading",
      headers: { "retry-after": `${seconds}` },
      cause: error,
    });
  }
  if (error instanceof ClusterError) {
    return new ApiError(503, error.message, {
      code: "cluster_unavailable",
      headers: { "retry-after": "5" },
      cause: error,
    });
  }
  if (error instanceof HTTPException) {
    return new ApiError(error.status as ContentfulStatusCode, error.message, { cause: error });
  }
  return new ApiError(500, "an internal error; the server's log says more", { cause: error });
}
