import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { join } from "node:path";
import { repoPath } from "../../tests/data.ts";
import { HubClient } from "./client.ts";
import type { HubOptions } from "./client.ts";
import { HubError } from "./errors.ts";
import { cacheFolder, modelPath, parseReference } from "./reference.ts";

const content = (size: number, seed: number) =>
  Uint8Array.from({ length: size }, (_, i) => (i * 7 + seed + (i >> 8)) & 255);
const sha256 = (data: Uint8Array) => createHash("sha256").update(data).digest("hex");

/** What the server does to the next requests for bytes. */
interface Mischief {
  /** Bytes after which each connection is cut, while there are any. */
  cuts?: number[];
  /** Ignore `Range`. */
  noRanges?: boolean;
  /** Answers before the first good one. */
  statuses?: number[];
  damage?: boolean;
}

/** A hub on this machine, with a second server in place of the network that serves its large files. */
class FakeHub {
  readonly files = new Map<string, { data: Uint8Array; large: boolean }>();
  readonly requests: {
    method: string;
    path: string;
    range: string | null;
    authorization: string | null;
    where: string;
  }[] = [];
  mischief: Mischief = {};
  token: string | undefined;
  readonly #hub = this.#serve("hub", (request) => this.#answer(request));
  readonly #store = this.#serve("store", (request) => this.#bytes(request));

  get endpoint(): string {
    return `http://127.0.0.1:${this.#hub.addr.port}`;
  }

  #serve(where: string, handler: (request: Request) => Response) {
    return Deno.serve({
      port: 0,
      hostname: "127.0.0.1",
      onListen: () => {},
      onError: () => new Response(null, { status: 500 }),
    }, (request) => {
      const path = decodeURIComponent(new URL(request.url).pathname);
      const [range, authorization] = [request.headers.get("range"), request.headers.get("authorization")];
      this.requests.push({ method: request.method, path, range, authorization, where });
      return handler(request);
    });
  }

  #answer(request: Request): Response {
    const url = new URL(request.url);
    if (this.token !== undefined && request.headers.get("authorization") !== `Bearer ${this.token}`) {
      return new Response("no", { status: 401, headers: { "x-error-code": "GatedRepo" } });
    }
    const tree = /^\/api\/models\/otters\/tiny\/tree\/main$/.exec(url.pathname);
    if (tree !== null) {
      const all = [...this.files].map(([path, { data }]) => ({ type: "file", path, size: data.length, oid: "x" }));
      const from = Number(url.searchParams.get("cursor") ?? 0);
      const more = from + 2 < all.length;
      return Response.json([{ type: "directory", path: "sub", size: 0, oid: "x" }, ...all.slice(from, from + 2)], {
        headers: more
          ? { link: `<${this.endpoint}${url.pathname}?recursive=true&cursor=${from + 2}>; rel="next"` }
          : {},
      });
    }
    const match = /^\/otters\/tiny\/resolve\/main\/(.+)$/.exec(decodeURIComponent(url.pathname));
    const file = this.files.get(match?.[1] ?? "");
    if (file === undefined) {
      const code = match === null ? "RepoNotFound" : "EntryNotFound";
      return new Response("none", { status: 404, headers: { "x-error-code": code } });
    }
    if (!file.large) {
      const oid = createHash("sha1").update(`blob ${file.data.length}\0`).update(file.data).digest("hex");
      const headers = { etag: `"${oid}"`, "content-length": String(file.data.length), "x-repo-commit": "c0ffee" };
      return new Response(request.method === "HEAD" ? null : this.#damaged(file.data), { headers });
    }
    return new Response(null, {
      status: 302,
      headers: {
        location: `http://127.0.0.1:${this.#store.addr.port}/blobs/${match![1]}?signature=abc`,
        "x-linked-size": String(file.data.length),
        "x-linked-etag": `"${sha256(file.data)}"`,
        "x-repo-commit": "c0ffee",
        etag: '"of the redirect"',
      },
    });
  }

  #bytes(request: Request): Response {
    const status = this.mischief.statuses?.shift();
    if (status !== undefined) return new Response("busy", { status });
    const { data } = this.files.get(decodeURIComponent(new URL(request.url).pathname).replace("/blobs/", ""))!;
    const range = this.mischief.noRanges === true ? null : /^bytes=(\d+)-$/.exec(request.headers.get("range") ?? "");
    const start = Number(range?.[1] ?? 0);
    if (start >= data.length) return new Response(null, { status: 416 });
    const rest = this.#damaged(data).subarray(start);
    const cut = this.mischief.cuts?.shift();
    const body = cut === undefined ? rest.slice() : new ReadableStream<Uint8Array>({
      async start(controller) {
        controller.enqueue(rest.slice(0, cut));
        await new Promise((resolve) => setTimeout(resolve, 20)); // let it leave
        controller.error(new Error("cut"));
      },
    });
    const headers: Record<string, string> = cut === undefined ? {} : { "content-length": String(rest.length) };
    if (range === null) return new Response(body, { headers });
    return new Response(body, {
      status: 206,
      headers: { ...headers, "content-range": `bytes ${start}-${data.length - 1}/${data.length}` },
    });
  }

  #damaged(data: Uint8Array): Uint8Array<ArrayBuffer> {
    const copy = data.slice();
    if (this.mischief.damage === true) copy[0]! ^= 1;
    return copy;
  }

  async close(): Promise<void> {
    await Promise.all([this.#hub.shutdown(), this.#store.shutdown()]);
  }
}

async function withHub(
  use: (
    hub: FakeHub,
    cache: string,
    pull: (reference: string, options?: HubOptions) => Promise<string>,
  ) => Promise<void>,
): Promise<void> {
  const hub = new FakeHub();
  const cache = await Deno.makeTempDir({ prefix: "lutra-hub-" });
  hub.files.set("tiny.Q4_0.gguf", { data: content(300_000, 1), large: true });
  hub.files.set("README.md", { data: content(500, 2), large: false });
  hub.files.set("sub dir/tiny.Q8_0.gguf", { data: content(70_000, 3), large: true });
  try {
    await use(hub, cache, async (text, options = {}) => {
      const client = new HubClient({ endpoint: hub.endpoint, token: undefined, delay: () => 1, ...options });
      let path = "";
      for (const reference of await client.choose(parseReference(text))) path = await client.pull(reference, cache);
      return path;
    });
  } finally {
    await hub.close();
    await Deno.remove(cache, { recursive: true });
  }
}

const says = (pattern: RegExp) => (error: unknown) => {
  assert.ok(error instanceof HubError, String(error));
  assert.match(error.message, pattern);
  return true;
};
const FILE = "hf:otters/tiny:tiny.Q4_0.gguf";

Deno.test("pull: a large file from where the hub redirects, a small one from the hub, checked and kept", () =>
  withHub(async (hub, cache, pull) => {
    const path = await pull(FILE);
    assert.deepEqual(await Deno.readFile(path), content(300_000, 1));
    assert.equal(modelPath(FILE, () => cache), path);
    assert.deepEqual(await Deno.readFile(await pull("hf:otters/tiny:README.md")), content(500, 2));
    assert.deepEqual(await Deno.readFile(await pull("hf:otters/tiny:sub dir/tiny.Q8_0.gguf")), content(70_000, 3));
    const before = hub.requests.length;
    assert.equal(await pull(FILE), path);
    assert.equal(hub.requests.length, before, "what is here is not asked for");
    for (const entry of Deno.readDirSync(join(path, ".."))) assert.ok(!entry.name.endsWith(".part"), entry.name);
  }));

Deno.test("pull: cut connections go on where they broke, in one command and in the next", () =>
  withHub(async (hub, _cache, pull) => {
    hub.mischief = { cuts: [100_000, 0, 50_000, 1] };
    assert.deepEqual(await Deno.readFile(await pull(FILE)), content(300_000, 1));
    const ranges = hub.requests.filter((r) => r.where === "store").map((r) => Number(/\d+/.exec(r.range ?? "0")![0]));
    assert.equal(ranges[0], 0);
    assert.ok(ranges.length >= 4 && ranges.at(-1)! > 0, ranges.join());
    for (let i = 1; i < ranges.length; i++) assert.ok(ranges[i]! >= ranges[i - 1]!, ranges.join());

    hub.mischief = { cuts: [30_000, 0, 0, 0, 0, 0, 0] };
    const other = "hf:otters/tiny:sub dir/tiny.Q8_0.gguf";
    await assert.rejects(pull(other), says(/cannot be reached.*is kept/s));
    hub.mischief = {};
    const at = hub.requests.length;
    assert.deepEqual(await Deno.readFile(await pull(other)), content(70_000, 3));
    assert.ok(
      Number(/\d+/.exec(hub.requests.slice(at).find((r) => r.where === "store")!.range!)![0]) > 0,
      "it went on",
    );
  }));

Deno.test("pull: a server without ranges starts anew; a busy one is asked again", () =>
  withHub(async (hub, _cache, pull) => {
    hub.mischief = { cuts: [100_000], noRanges: true, statuses: [503, 429] };
    assert.deepEqual(await Deno.readFile(await pull(FILE)), content(300_000, 1));
  }));

Deno.test("pull: a file whose hash is wrong is dropped", () =>
  withHub(async (hub, cache, pull) => {
    for (const file of [FILE, "hf:otters/tiny:README.md"]) {
      hub.mischief = { damage: true };
      await assert.rejects(pull(file), says(/(sha256|git) [0-9a-f]+, but should have/));
      assert.throws(() => modelPath(file, () => cache), says(/is not here yet: fetch it with `pull hf:/));
      hub.mischief = {};
      await pull(file);
    }
  }));

Deno.test("pull: the token goes to the hub and nowhere else; without it the refusal says what to do", () =>
  withHub(async (hub, _cache, pull) => {
    hub.token = "secret";
    await assert.rejects(pull(FILE), says(/401.*HF_TOKEN/));
    await assert.rejects(pull(FILE, { token: "wrong" }), says(/401/));
    await pull(FILE, { token: "secret" });
    const told = (where: string) => hub.requests.filter((r) => r.where === where).map((r) => r.authorization);
    assert.ok(told("hub").includes("Bearer secret"));
    assert.ok(told("store").length > 0 && told("store").every((authorization) => authorization === null));
  }));

Deno.test("pull: what is not there is named, with what may have been meant", () =>
  withHub(async (hub, _cache, pull) => {
    await assert.rejects(
      pull("hf:otters/tiny:tiny.Q4_1.gguf"),
      says(/there is no .*tiny.Q4_1.gguf; there are\n {2}hf:otters\/tiny:tiny.Q4_0.gguf {2}\(300.0 kB\)/),
    );
    await assert.rejects(pull("hf:otters/none:x.gguf"), says(/there is no hf:otters\/none:x.gguf on http/));
    await assert.rejects(pull("hf:otters/tiny"), says(/several GGUF files; choose one:\n.*Q4_0.*\n.*Q8_0/));
    hub.files.delete("tiny.Q4_0.gguf");
    assert.match(await pull("hf:otters/tiny"), /tiny\.Q8_0\.gguf$/);
    hub.files.delete("sub dir/tiny.Q8_0.gguf");
    await assert.rejects(pull("hf:otters/tiny"), says(/neither a GGUF file nor/));
  }));

Deno.test("pull: safetensors come with what belongs to them, and are no model before all is there", () =>
  withHub(async (hub, cache, pull) => {
    hub.files.clear();
    for (
      const [name, size] of [["config.json", 90], ["tokenizer.json", 800], ["pytorch_model.bin", 9], [
        "a.png",
        9,
      ]] as const
    ) {
      hub.files.set(name, { data: content(size, 5), large: false });
    }
    hub.files.set("model.safetensors", { data: content(50_000, 6), large: true });
    hub.mischief = { cuts: [100, 0, 0, 0, 0, 0, 0] };
    await assert.rejects(pull("hf:otters/tiny"), says(/cannot be reached/));
    assert.throws(() => modelPath("hf:otters/tiny", () => cache), says(/is not here yet/));
    hub.mischief = {};
    const folder = join(await pull("hf:otters/tiny"), "..");
    assert.equal(modelPath("hf:otters/tiny", () => cache), folder);
    const names = [...Deno.readDirSync(folder)].map(({ name }) => name).sort();
    assert.deepEqual(names, ["config.json", "model.safetensors", "tokenizer.json"]);
  }));

Deno.test("pull: any file of a split GGUF brings all of them, the first last", () =>
  withHub(async (hub, cache, pull) => {
    hub.files.clear();
    const parts = [1, 2, 3].map((i) => `Q4/otter-0000${i}-of-00003.gguf`);
    for (const [i, name] of parts.entries()) hub.files.set(name, { data: content(20_000, i), large: true });
    for (const reference of ["hf:otters/tiny", `hf:otters/tiny:${parts[1]}`]) {
      hub.mischief = { cuts: [20_000, 20_000, 100, 0, 0, 0, 0, 0, 0] };
      await assert.rejects(pull(reference), says(/cannot be reached/));
      assert.throws(() => modelPath(reference, () => cache), says(/is not here yet/));
      hub.mischief = {};
      const path = await pull(reference);
      assert.ok(path.endsWith(join("Q4", "otter-00001-of-00003.gguf")), path);
      assert.equal(modelPath(reference, () => cache), path);
      assert.equal([...Deno.readDirSync(join(path, ".."))].length, 3);
      Deno.removeSync(join(path, ".."), { recursive: true });
    }
    hub.files.set("Q8/otter-00001-of-00002.gguf", { data: content(9, 1), large: true });
    hub.files.set("Q8/otter-00002-of-00002.gguf", { data: content(9, 2), large: true });
    await assert.rejects(
      pull("hf:otters/tiny"),
      says(/several GGUF files[^]*Q4\/otter-00001\S+ +\(60\.00 kB\)\n.*Q8\/otter-00001\S+ +\(18 B\)$/),
    );
  }));

Deno.test("pull: safetensors in several files come before the index that names them", () =>
  withHub(async (hub, cache, pull) => {
    hub.files.clear();
    const parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    hub.files.set("model.safetensors.index.json", { data: content(90, 5), large: false });
    for (const name of ["config.json", "tokenizer.json"]) hub.files.set(name, { data: content(90, 5), large: false });
    hub.files.set("original/consolidated-00001-of-00002.safetensors", { data: content(9, 5), large: true });
    for (const [i, name] of parts.entries()) hub.files.set(name, { data: content(50_000, i), large: true });
    hub.mischief = { cuts: [50_000, 100, 0, 0, 0, 0, 0, 0] };
    await assert.rejects(pull("hf:otters/tiny"), says(/cannot be reached/));
    assert.throws(() => modelPath("hf:otters/tiny", () => cache), says(/is not here yet/));
    hub.mischief = {};
    const folder = join(await pull("hf:otters/tiny"), "..");
    assert.equal(modelPath("hf:otters/tiny", () => cache), folder);
    const names = [...Deno.readDirSync(folder)].map(({ name }) => name).sort();
    assert.deepEqual(names, ["config.json", ...parts, "model.safetensors.index.json", "tokenizer.json"]);
  }));

Deno.test({
  name: "pull: a full disk is said, and what has come stays",
  ignore: Deno.build.os !== "linux", // /dev/full
  fn: () =>
    withHub(async (hub, cache, pull) => {
      const folder = join(cache, "models", "otters--tiny", "main");
      await Deno.mkdir(folder, { recursive: true });
      const part = join(folder, `tiny.Q4_0.gguf.${sha256(content(300_000, 1)).slice(0, 16)}.part`);
      await Deno.symlink("/dev/full", part);
      await assert.rejects(pull(FILE), says(/is full: make room/));
      await Deno.remove(part);
      hub.files.set("huge.gguf", { data: content(10, 1), large: true });
      await pull(FILE);
    }),
});

Deno.test("pull: an address that is no hub, and one that nobody answers", async () => {
  const cache = await Deno.makeTempDir();
  const server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen: () => {} }, () => new Response("hello"));
  const endpoint = `http://127.0.0.1:${server.addr.port}`;
  const client = new HubClient({ endpoint, token: undefined, delay: () => 1 });
  await assert.rejects(client.choose(parseReference("hf:a/b")), says(/is it a hub/));
  await assert.rejects(client.pull({ repo: "a/b", revision: "main", file: "c.gguf" }, cache), says(/size and hash/));
  await server.shutdown();
  await assert.rejects(client.choose(parseReference("hf:a/b")), says(/cannot be reached/));
  await Deno.remove(cache, { recursive: true });
});

Deno.test("pull: the command, with endpoint, token, proxy and cache from the environment", () =>
  withHub(async (hub, cache) => {
    hub.token = "secret";
    const seen: string[] = [];
    // A proxy for plain HTTP: the request line has the whole address.
    const proxy = Deno.listen({ port: 0, hostname: "127.0.0.1" });
    const serving = (async () => {
      for await (const client of proxy) {
        const buffer = new Uint8Array(8192);
        const head = new TextDecoder().decode(buffer.subarray(0, await client.read(buffer) ?? 0));
        const [method, address] = head.split(" ") as [string, string];
        seen.push(address);
        const url = new URL(address);
        const headers = Object.fromEntries(
          head.split("\r\n").slice(1).filter((line) => /^(authorization|range):/i.test(line)).map((line) =>
            line.split(": ") as [string, string]
          ),
        );
        const local = url.hostname === "hub.invalid" ? `${hub.endpoint}${url.pathname}${url.search}` : address;
        const response = await fetch(local, { method, headers, redirect: "manual" });
        const body = new Uint8Array(await response.arrayBuffer());
        const kept = [...response.headers].filter(([name]) =>
          !["transfer-encoding", "content-length", "connection"].includes(name)
        );
        const length = method === "HEAD" ? response.headers.get("content-length") ?? "0" : String(body.length);
        const lines = [
          `HTTP/1.1 ${response.status} x`,
          ...kept.map(([n, v]) => `${n}: ${v}`),
          `content-length: ${length}`,
          "connection: close",
        ];
        const out = [new TextEncoder().encode(lines.join("\r\n") + "\r\n\r\n"), body];
        for (const part of out) for (let at = 0; at < part.length;) at += await client.write(part.subarray(at));
        client.close();
      }
    })();
    const run = async (...args: string[]) => {
      const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-q", "-P=pull", repoPath("mod.ts"), ...args],
        cwd: repoPath(),
        env: {
          NO_COLOR: "1",
          HF_ENDPOINT: "http://hub.invalid",
          HF_TOKEN: "secret",
          LUTRA_CACHE: cache,
          HTTP_PROXY: `http://127.0.0.1:${proxy.addr.port}`,
          http_proxy: `http://127.0.0.1:${proxy.addr.port}`,
          NO_PROXY: "",
          no_proxy: "",
        },
      }).output();
      const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
      return { code, stdout: text(stdout), stderr: text(stderr) };
    };
    const pulled = await run("pull", FILE);
    assert.equal(pulled.code, 0, pulled.stderr);
    assert.match(pulled.stdout, /^hf:otters\/tiny:tiny\.Q4_0\.gguf is at .*tiny\.Q4_0\.gguf\n$/);
    assert.match(pulled.stderr, /100 % of 300.0 kB/);
    assert.ok(seen.some((address) => address.startsWith("http://hub.invalid/otters/tiny/resolve/main/")), seen.join());
    assert.ok(seen.some((address) => address.includes("/blobs/")), "the bytes too");
    const inspected = await run("inspect", FILE);
    assert.match(inspected.stderr, /is no GGUF file/, "it is looked at, and is no model");
    const missing = await run("inspect", "hf:otters/tiny:other.gguf");
    assert.match(missing.stderr, /pull hf:otters\/tiny:other\.gguf/);
    proxy.close();
    await serving;
  }));

Deno.test("parseReference: what is and is not one", () => {
  assert.deepEqual(parseReference("hf:a/b"), { repo: "a/b", revision: "main" });
  assert.deepEqual(parseReference("hf:a.x/b-1@v1.0:d/e f.gguf"), {
    repo: "a.x/b-1",
    revision: "v1.0",
    file: "d/e f.gguf",
  });
  for (
    const text of [
      "hf:a",
      "hf:a/b/c",
      "hf:../b:x",
      "hf:a/..:x",
      "hf:a/b:../x",
      "hf:a/b:x/../../y",
      "hf:a/b:/etc/x",
      "hf:a/b:",
      "hf:a/b@:x",
      "hf:a/b:x\\..\\y",
      "hf:a/b:x\0",
      "hf:a/b@../x:y",
      "hf:a/b:.",
      "hf:a/b:x?y",
    ]
  ) assert.throws(() => parseReference(text), says(/is not of the form/), text);
});

Deno.test("cacheFolder: the user's, or the one named", () => {
  const of = (variables: Record<string, string>) => cacheFolder((name) => variables[name]);
  assert.equal(of({ LUTRA_CACHE: "/x", HOME: "/h" }), "/x");
  if (Deno.build.os === "linux") {
    assert.equal(of({ HOME: "/h" }), "/h/.cache/lutra");
    assert.equal(of({ XDG_CACHE_HOME: "/c", HOME: "/h", LUTRA_CACHE: "" }), "/c/lutra");
    assert.equal(of({ XDG_CACHE_HOME: "c", HOME: "/h" }), "/h/.cache/lutra");
  }
  assert.throws(() => of({}), says(/LUTRA_CACHE/));
});
