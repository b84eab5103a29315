import process from "node:process";

/** Milliseconds before loading is worth a word. */
const QUIET_MS = 300;

/** Shows on a terminal how far loading is, in a line that goes when it is done. */
export class LoadingLine implements Disposable {
  readonly #start = performance.now();
  #shown = false;

  /** Takes the share that is loaded, 0 to 1. */
  readonly show = (fraction: number): void => {
    if (!process.stderr.isTTY || performance.now() - this.#start < QUIET_MS) return;
    this.#shown = true;
    process.stderr.write(`\rpacking ${Math.floor(100 * fraction)} %\x1b[K`);
  };

  [Symbol.dispose](): void {
    if (this.#shown) process.stderr.write("\r\x1b[K");
  }
}
