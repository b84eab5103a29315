/**
 * The HTTP interface: OpenAI's routes over an engine. Requests come from clients, are validated once by `schema.ts`, and
 * become generations of the engine; answers leave as JSON or as server-sent events.
 *
 * @module
 */
export { createApp } from "./app.ts";
export { createLoadingApp } from "./loading.ts";
export type { AppOptions } from "./app.ts";
