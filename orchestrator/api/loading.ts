import { Hono } from "hono";
import { ApiError } from "./errors.ts";

/** Seconds after which a client may ask again. */
const RETRY_AFTER = { "retry-after": "2" };

/**
 * Answers while the model is being loaded: 503 with `Retry-After`, and how far it is.
 *
 * @param progress Share that is loaded, 0 to 1.
 */
export function createLoadingApp(progress: () => number): Hono {
  const app = new Hono();
  const percent = () => Math.floor(100 * progress());
  app.get("/healthz", (c) => c.json({ status: "loading", progress: progress() }, 503, RETRY_AFTER));
  app.all("*", (c) => {
    const error = new ApiError(503, `the model is being loaded (${percent()} %); try again soon`, {
      code: "model_loading",
    });
    return c.json(error.body, 503, RETRY_AFTER);
  });
  return app;
}
