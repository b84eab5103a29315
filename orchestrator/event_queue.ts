/**
 * Events from a producer that never waits to one consumer: what is not consumed yet is kept. Breaking out of the loop over it
 * calls `onReturn`.
 */
export class EventQueue<T> implements AsyncIterableIterator<T> {
  readonly #onReturn: () => void;
  #events: T[] = [];
  #waiters: { resolve: (result: IteratorResult<T>) => void; reject: (error: unknown) => void }[] = [];
  #end: { error?: unknown } | undefined;

  constructor(onReturn: () => void) {
    this.#onReturn = onReturn;
  }

  /** Adds an event; ignored after the end. */
  push(event: T): void {
    if (this.#end !== undefined) return;
    const waiter = this.#waiters.shift();
    if (waiter === undefined) this.#events.push(event);
    else waiter.resolve({ done: false, value: event });
  }

  /** Ends after the events that are there. */
  end(): void {
    if (this.#end !== undefined) return;
    this.#end = {};
    for (const waiter of this.#waiters.splice(0)) waiter.resolve({ done: true, value: undefined });
  }

  /** Ends with an error at once: events not consumed yet are dropped. */
  fail(error: unknown): void {
    if (this.#end !== undefined) return;
    this.#events = [];
    const first = this.#waiters.shift();
    if (first === undefined) this.#end = { error };
    else {
      this.#end = {};
      first.reject(error);
    }
    for (const waiter of this.#waiters.splice(0)) waiter.resolve({ done: true, value: undefined });
  }

  next(): Promise<IteratorResult<T>> {
    const event = this.#events.shift();
    if (event !== undefined) return Promise.resolve({ done: false, value: event });
    if (this.#end === undefined) {
      return new Promise((resolve, reject) => this.#waiters.push({ resolve, reject }));
    }
    if ("error" in this.#end) {
      const { error } = this.#end;
      this.#end = {};
      return Promise.reject(error);
    }
    return Promise.resolve({ done: true, value: undefined });
  }

  return(): Promise<IteratorResult<T>> {
    this.#onReturn();
    this.#events = [];
    this.end();
    this.#end = {};
    return Promise.resolve({ done: true, value: undefined });
  }

  throw(error: unknown): Promise<IteratorResult<T>> {
    return this.return().then(() => Promise.reject(error));
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }
}
