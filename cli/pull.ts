import process from "node:process";
import type { Command } from "commander";
import { HubClient } from "./hub/client.ts";
import type { Progress } from "./hub/client.ts";
import { bytes } from "./inspect.ts";
import { cacheFolder, parseReference, referenceText } from "./hub/reference.ts";

/** Adds the command `pull`. */
export function addPull(program: Command): void {
  program.command("pull")
    .description("fetch a model from Hugging Face, or a hub like it (HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY are heeded)")
    .argument(
      "<model>",
      "hf:org/repo[@revision][:file]; without a file, the repository's only GGUF, or its safetensors",
    )
    .action(async (text: string) => {
      const hub = new HubClient();
      for (const reference of await hub.choose(parseReference(text))) {
        const line = new ProgressLine();
        const path = await hub.pull(reference, cacheFolder(), line.show).finally(() => line.end());
        console.log(`${referenceText(reference)} is at ${path}`);
      }
    });
}

/** How far a download is: a line that changes on a terminal, one every tenth elsewhere. */
class ProgressLine {
  readonly #start = performance.now();
  #next = 0;

  readonly show = ({ done, total, resumed }: Progress): void => {
    const now = performance.now();
    const terminal = process.stderr.isTTY === true;
    if (terminal ? now < this.#next && done < total : done < total * this.#next) return;
    this.#next = terminal ? now + 200 : Math.floor(10 * done / total) / 10 + 0.1;
    const seconds = (now - this.#start) / 1000;
    const rate = seconds > 0 ? (done - resumed) / seconds : 0;
    const left = rate > 0 ? `, ${Math.ceil((total - done) / rate)} s left` : "";
    const share = total === 0 ? 100 : Math.floor(100 * done / total);
    const text = `${share} % of ${bytes(total)}, ${bytes(rate)}/s${left}`;
    process.stderr.write(terminal ? `\r${text}\x1b[K` : `${text}\n`);
  };

  end(): void {
    if (process.stderr.isTTY === true) process.stderr.write("\r\x1b[K");
  }
}
