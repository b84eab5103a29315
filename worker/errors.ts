/** Base of every error of the worker room. */
export class WorkerError extends Error {
  override name = "WorkerError";
}

/** The kernel library is absent, unreadable or of another version; the message says what to do. */
export class KernelLibraryError extends WorkerError {
  override name = "KernelLibraryError";
}

/** Error codes of the kernel library. */
export const KernelErrorCode = {
  invalidArgument: -1,
  invalidData: -2,
  unsupported: -3,
  /** No memory, or no free KV block. */
  exhausted: -4,
  io: -5,
  badHandle: -6,
  /** A position after the sequence's end. */
  sequenceGap: -7,
  /** The stop flag was set; nothing changed. */
  stopped: -8,
  /** A lane's connection is gone, or cannot be made. */
  lost: -9,
  panic: -99,
} as const;

/** The kernel library refused a call. */
export class KernelError extends WorkerError {
  override name = "KernelError";
  /** One of {@linkcode KernelErrorCode}. */
  readonly code: number;

  constructor(code: number, message: string) {
    super(message);
    this.code = code;
  }
}
