import assert from "node:assert/strict";
import { dirname } from "node:path";
import { NatsBus } from "../bus/mod.ts";
import { repoPath } from "../tests/data.ts";
import { nats } from "../tests/nats.ts";

Deno.test({
  name: "serve --nats embedded: its server ends with it, even when it is killed without a word",
  ignore: nats.absent || Deno.build.os === "windows",
  async fn() {
    const model = repoPath("models", "lutra-books-6M-TQ2_0.gguf");
    const flags = ["--nats", "embedded", "--nats-port", "0", "--port", "0", "--no-worker"];
    const path = nats.path === undefined ? "" : `${dirname(nats.path)}:`;
    const child = new Deno.Command(Deno.execPath(), {
      args: ["run", "-q", "-P=serve", repoPath("mod.ts"), "serve", model, ...flags],
      cwd: repoPath(),
      env: { NO_COLOR: "1", PATH: `${path}${Deno.env.get("PATH")}`, LUTRA_CACHE: "/dev/null" },
      ...{ stdin: "null", stdout: "null", stderr: "piped" },
    }).spawn();
    let text = "";
    let servers: string | undefined;
    for await (const part of child.stderr.pipeThrough(new TextDecoderStream())) {
      text += part;
      servers = /NATS server on (127\.0\.0\.1:\d+)/.exec(text)?.[1];
      if (servers !== undefined) break;
    }
    assert(servers !== undefined, text);
    await (await NatsBus.connect({ servers })).close();
    child.kill("SIGKILL");
    await child.status;
    for (const deadline = performance.now() + 5000;; await new Promise((resolve) => setTimeout(resolve, 20))) {
      try {
        await (await Deno.connect({ hostname: "127.0.0.1", port: Number(servers.split(":")[1]) })).close();
      } catch (error) {
        assert(error instanceof Deno.errors.ConnectionRefused, String(error));
        break;
      }
      assert(performance.now() < deadline, "the server lives on");
    }
  },
});
