/** Base of every error of the orchestrator. */
export class OrchestratorError extends Error {
  override name = "OrchestratorError";
}

/** A request is malformed: an option out of range, no prompt, a token that the model lacks. */
export class RequestError extends OrchestratorError {
  override name = "RequestError";
}

/** A prompt leaves no room for an answer. */
export class ContextLengthError extends RequestError {
  override name = "ContextLengthError";
  /** Tokens of the prompt. */
  readonly promptTokens: number;
  /** Tokens that prompt and answer may have together. */
  readonly contextLength: number;

  constructor(promptTokens: number, contextLength: number) {
    super(`the prompt has ${promptTokens} tokens; the context holds ${contextLength}, of which the answer needs one`);
    this.promptTokens = promptTokens;
    this.contextLength = contextLength;
  }
}

/** As many requests wait as may; try again later. */
export class QueueFullError extends OrchestratorError {
  override name = "QueueFullError";
  /** How many requests may wait. */
  readonly limit: number;

  constructor(limit: number) {
    super(`${limit} requests are waiting already`);
    this.limit = limit;
  }
}

/** Workers are missing, were lost, or failed. */
export class ClusterError extends OrchestratorError {
  override name = "ClusterError";
}

/** The bus was away: messages that were on their way may be lost. */
export class BusAwayError extends ClusterError {
  override name = "BusAwayError";

  constructor() {
    super("the bus was away: messages may be lost");
  }
}

/** Workers are loading the model. */
export class LoadingError extends ClusterError {
  override name = "LoadingError";
  /** Milliseconds that it will take still; `null` when that is not known. */
  readonly etaMs: number | null;

  constructor(message: string, etaMs: number | null) {
    super(message);
    this.etaMs = etaMs;
  }
}

/** A worker did not do what it was asked for. */
export class LoadError extends ClusterError {
  override name = "LoadError";
  readonly worker: string;
  /** Whether it was not heard of, rather than refused. */
  readonly silent: boolean;

  constructor(message: string, worker: string, silent: boolean, options?: ErrorOptions) {
    super(message, options);
    this.worker = worker;
    this.silent = silent;
  }
}

/** The model does not fit the workers. */
export class PlacementError extends ClusterError {
  override name = "PlacementError";
}

/** The engine was closed. */
export class EngineClosedError extends ClusterError {
  override name = "EngineClosedError";

  constructor(options?: ErrorOptions) {
    super("the engine is closed", options);
  }
}
