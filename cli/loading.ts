import process from "node:process";
import { describeLoading } from "../orchestrator/mod.ts";
import type { WorkerLoading } from "../orchestrator/mod.ts";

/** Milliseconds before loading is worth a word, and between two lines where the output is no terminal. */
const QUIET_MS = 300;
const EVERY_MS = 5000;

/** Shows how far loading is: on a terminal in a line that goes when it is done, else, of a cluster, in a line every five seconds. */
export class LoadingLine implements Disposable {
  #since: number | undefined;
  #told = 0;
  #shown = false;

  /** Takes the share that is loaded, 0 to 1, and how far each worker is; none is left when all is loaded. */
  readonly show = (fraction: number, workers: readonly WorkerLoading[]): void => {
    if (workers.length === 0) return this[Symbol.dispose]();
    const cluster = workers.length > 1 || workers.some(({ phase }) => phase !== "packing");
    this.tell(cluster ? describeLoading(workers) : `packing ${Math.floor(100 * fraction)} %`, cluster);
  };

  /** Shows a text in place of the one before; `lasting`: also where the output is no terminal. */
  tell(text: string, lasting = false): void {
    const now = performance.now();
    this.#since ??= now;
    if (now - this.#since < QUIET_MS) return;
    if (process.stderr.isTTY) {
      this.#shown = true;
      process.stderr.write(`\r${text}\x1b[K`);
    } else if (lasting && now - this.#told >= EVERY_MS) {
      this.#told = now;
      console.error(text);
    }
  }

  [Symbol.dispose](): void {
    this.#since = undefined;
    if (this.#shown) process.stderr.write("\r\x1b[K");
    this.#shown = false;
  }
}
