/**
 * Fetches files from a hub that speaks Hugging Face's protocol: a tree listing, and `resolve` addresses that say the size and
 * hash of a file and where its bytes are.
 *
 * Bytes go to a `.part` file, which a later attempt goes on with; only a file whose hash is right gets its name. The token goes
 * to the hub alone, never to where it redirects.
 *
 * @module
 */
import { createHash } from "node:crypto";
import { mkdirSync, statfsSync } from "node:fs";
import { dirname, join } from "node:path";
import { z } from "zod";
import { splitNames } from "../../model/mod.ts";
import { bytes } from "../inspect.ts";
import { HubError } from "./errors.ts";
import { FOLDER_INDEX, FOLDER_WEIGHTS, isFirst, referenceText, repoFolder } from "./reference.ts";
import type { HubReference } from "./reference.ts";

const DEFAULT_ENDPOINT = "https://huggingface.co";
const MAX_REDIRECTS = 5;
const MAX_LISTED = 100_000;
/** Attempts in a row that bring no byte before giving up. */
const MAX_FRUITLESS = 5;

/** What a folder with safetensors has beside its weights. */
const FOLDER_FILES: ReadonlySet<string> = new Set([
  ...["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
]);

/** Options of {@linkcode HubClient}. */
export interface HubOptions {
  /** The hub's address. Default: `HF_ENDPOINT`, else Hugging Face's. */
  endpoint?: string;
  /** Default: `HF_TOKEN`; none is sent without. */
  token?: string | undefined;
  /** Milliseconds to wait before the next attempt, after `n` fruitless ones. Default: 0.5 s, doubling up to 8 s. */
  delay?: (n: number) => number;
  signal?: AbortSignal;
}

/** How far a download is, in bytes. */
export interface Progress {
  readonly done: number;
  readonly total: number;
  /** What an earlier attempt had left. */
  readonly resumed: number;
}

/** A file as a tree lists it. */
export interface HubFile {
  readonly path: string;
  readonly size: number;
}

interface Target {
  readonly size: number;
  /** What its content hashes to: SHA-256 for large files, git's blob hash for small ones. */
  readonly hash: { readonly kind: "sha256" | "git"; readonly hex: string };
}

const treeSchema = z.array(z.object({ type: z.string(), path: z.string(), size: z.number().int().nonnegative() }));

/** A hub. */
export class HubClient {
  readonly #endpoint: string;
  readonly #token: string | undefined;
  readonly #delay: (n: number) => number;
  readonly #signal: AbortSignal | undefined;

  constructor(options: HubOptions = {}) {
    this.#endpoint = (options.endpoint ?? (Deno.env.get("HF_ENDPOINT") || DEFAULT_ENDPOINT)).replace(/\/+$/, "");
    if (!URL.canParse(this.#endpoint)) throw new HubError(`HF_ENDPOINT ${this.#endpoint} is no address`);
    this.#token = "token" in options ? options.token : Deno.env.get("HF_TOKEN") || undefined;
    this.#delay = options.delay ?? ((n) => Math.min(500 * 2 ** (n - 1), 8000));
    this.#signal = options.signal;
  }

  /** The files of a repository. */
  async files(reference: HubReference): Promise<HubFile[]> {
    const { repo, revision } = reference;
    const files: HubFile[] = [];
    let address: string | undefined = `${this.#endpoint}/api/models/${repo}/tree/${
      encodeURIComponent(revision)
    }?recursive=true`;
    while (address !== undefined) {
      const response = await this.#attempt(() => this.#get(address!, {}));
      if (!response.ok) throw await this.#refusal(response, reference);
      const parsed = treeSchema.safeParse(await response.json().catch(() => undefined));
      if (!parsed.success) throw new HubError(`${this.#endpoint} answers with no list of files: is it a hub?`);
      for (const { type, path, size } of parsed.data) if (type === "file") files.push({ path, size });
      if (files.length > MAX_LISTED) throw new HubError(`${repo} has more than ${MAX_LISTED} files`);
      const next: string | undefined = /<([^>]+)>\s*;\s*rel="next"/.exec(response.headers.get("link") ?? "")?.[1];
      address = next === undefined ? undefined : new URL(next, address).href;
    }
    return files;
  }

  /**
   * The files to fetch: the GGUF that the reference names, or else the repository's only one, or else its safetensors with what
   * belongs to them. What makes them a model comes last: of a split GGUF its first file, the weights of a folder.
   *
   * @throws {HubError} listing those there are, when it is not clear.
   */
  async choose(reference: HubReference): Promise<(HubReference & { file: string })[]> {
    if (reference.file !== undefined) return wholeModel(reference, reference.file);
    const files = await this.files(reference);
    const models = modelsOf(files);
    if (models.length > 1) {
      throw new HubError(
        `${referenceText(reference)} has several GGUF files; choose one:\n${listed(models, reference)}`,
      );
    }
    const [only] = models;
    if (only !== undefined) return wholeModel(reference, only.path);
    const paths = files.map(({ path }) => path);
    const beside = paths.filter((path) => FOLDER_FILES.has(path));
    // What makes the folder a model comes last, so that it is there only when all is.
    const last = [FOLDER_WEIGHTS, FOLDER_INDEX].find((path) => paths.includes(path));
    if (last === undefined || !beside.includes("config.json")) {
      throw new HubError(
        `${referenceText(reference)} has neither a GGUF file nor ${FOLDER_WEIGHTS} with its config.json`,
      );
    }
    const parts = last === FOLDER_INDEX ? paths.filter((path) => /^[^/]+-of-\d+\.safetensors$/.test(path)).sort() : [];
    return [...beside, ...parts, last].map((file) => ({ ...reference, file }));
  }

  /**
   * Fetches a file into the cache, or what is missing of it, and checks it.
   *
   * @returns Its path.
   * @throws {HubError} when that is not possible.
   */
  async pull(
    reference: HubReference & { file: string },
    cache: string,
    onProgress: (progress: Progress) => void = () => {},
  ): Promise<string> {
    const folder = repoFolder(reference, cache);
    const path = join(folder, ...reference.file.split("/"));
    if (await isFile(path)) return path;
    const address = `${this.#endpoint}/${reference.repo}/resolve/${encodeURIComponent(reference.revision)}/${
      reference.file.split("/").map(encodeURIComponent).join("/")
    }`;
    const target = await this.#target(address, reference);
    try {
      mkdirSync(dirname(path), { recursive: true });
    } catch (cause) {
      throw new HubError(`${dirname(path)} cannot be made: ${(cause as Error).message}`, { cause });
    }
    const part = `${path}.${target.hash.hex.slice(0, 16)}.part`; // of another version of the file there is nothing to go on with
    using file = await Deno.open(part, { read: true, write: true, create: true });
    await file.lock(true); // another process that fetches the same waits here
    if (await isFile(path)) return path;
    await this.#fill(file, address, target, folder, reference, onProgress);
    const actual = await hashOf(file, target);
    if (actual !== target.hash.hex) {
      await Deno.remove(part);
      throw new HubError(
        `${referenceText(reference)} came with ${target.hash.kind} ${actual}, but should have ${target.hash.hex}: ` +
          "it was damaged on the way and is dropped; try again",
      );
    }
    await file.sync();
    await Deno.rename(part, path);
    return path;
  }

  /** Size and hash, from the hub itself: where it redirects to knows nothing of them. */
  async #target(address: string, reference: HubReference): Promise<Target> {
    const response = await this.#attempt(() => this.#send(address, { method: "HEAD", redirect: "manual" }));
    await response.body?.cancel();
    if (response.status >= 400) throw await this.#refusal(response, reference);
    const header = (name: string) => response.headers.get(name) ?? undefined;
    const size = Number(header("x-linked-size") ?? header("content-length") ?? NaN);
    const hex = (header("x-linked-etag") ?? header("etag") ?? "").replace(/^W\//, "").replaceAll('"', "").toLowerCase();
    const kind = /^[0-9a-f]{64}$/.test(hex) ? "sha256" : /^[0-9a-f]{40}$/.test(hex) ? "git" : undefined;
    if (!Number.isSafeInteger(size) || size < 0 || kind === undefined) {
      throw new HubError(
        `${this.#endpoint} does not say the size and hash of ${referenceText(reference)}: is it a hub?`,
      );
    }
    return { size, hash: { kind, hex } };
  }

  /** Appends to the part until it is whole. */
  async #fill(
    file: Deno.FsFile,
    address: string,
    { size }: Target,
    folder: string,
    reference: HubReference,
    onProgress: (progress: Progress) => void,
  ): Promise<void> {
    let done = (await file.stat()).size;
    if (done > size) await file.truncate(done = 0);
    const resumed = done;
    const free = freeBytes(folder);
    if (free < size - done) {
      throw new HubError(`${folder} has ${bytes(free)} left, but ${bytes(size - done)} are needed: make room there`);
    }
    onProgress({ done, total: size, resumed });
    for (let fruitless = 0; done < size;) {
      const before = done;
      let failure: unknown;
      try {
        const response = await this.#get(address, done === 0 ? {} : { range: `bytes=${done}-` });
        if (response.status === 416 || (done > 0 && response.status === 200)) await file.truncate(done = 0); // it cannot resume
        if (response.status >= 500 || response.status === 416 || response.status === 429) {
          await response.body?.cancel();
          throw new Error(`the server answers ${response.status}`);
        }
        if (!response.ok) throw await this.#refusal(response, reference);
        const start = Number(/^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "")?.[1] ?? 0);
        if (start !== done) throw new Error(`the server sends from byte ${start}, not ${done}`);
        await file.seek(done, Deno.SeekMode.Start);
        for await (const chunk of response.body ?? []) {
          if (done + chunk.length > size) {
            throw new HubError(`the server sends more than the ${size} bytes that it told`);
          }
          await writeAll(file, chunk, folder);
          done += chunk.length;
          onProgress({ done, total: size, resumed });
        }
      } catch (error) {
        if (error instanceof HubError || this.#signal?.aborted === true) throw error;
        failure = error;
      }
      fruitless = done > before ? 0 : fruitless + 1;
      if (done < size) await this.#pause(fruitless, failure ?? new Error("the connection was cut"));
    }
  }

  /** A request that is repeated while the network or the server fails. */
  async #attempt(send: () => Promise<Response>): Promise<Response> {
    for (let fruitless = 1;; fruitless++) {
      let failure: unknown;
      try {
        const response = await send();
        if (response.status < 500 && response.status !== 429) return response;
        await response.body?.cancel();
        failure = new Error(`the server answers ${response.status}`);
      } catch (error) {
        if (error instanceof HubError || this.#signal?.aborted === true) throw error;
        failure = error;
      }
      await this.#pause(fruitless, failure);
    }
  }

  async #pause(fruitless: number, cause: unknown): Promise<void> {
    if (fruitless >= MAX_FRUITLESS) {
      throw new HubError(
        `${this.#endpoint} cannot be reached: ${(cause as Error).message}. What has come is kept; try again later`,
        { cause },
      );
    }
    this.#signal?.throwIfAborted();
    if (fruitless > 0) await new Promise((resolve) => setTimeout(resolve, this.#delay(fruitless)));
  }

  /** Follows redirects, leaving the token at home. */
  async #get(address: string, headers: Record<string, string>): Promise<Response> {
    let at = address;
    for (let i = 0; i <= MAX_REDIRECTS; i++) {
      const response = await this.#send(at, { headers, redirect: "manual" });
      const location = response.headers.get("location");
      if (response.status < 300 || response.status >= 400 || location === null) return response;
      await response.body?.cancel();
      const next = new URL(location, at);
      if (next.protocol !== "https:" && next.protocol !== new URL(this.#endpoint).protocol) {
        throw new HubError(`${this.#endpoint} redirects to ${next.protocol}`);
      }
      at = next.href;
    }
    throw new HubError(`${this.#endpoint} redirects in circles`);
  }

  async #send(address: string, init: RequestInit & { headers?: Record<string, string> }): Promise<Response> {
    const own = new URL(address).origin === new URL(this.#endpoint).origin;
    const authorization = own && this.#token !== undefined ? { authorization: `Bearer ${this.#token}` } : {};
    // As it is, so that ranges count the file's own bytes.
    const headers = { "accept-encoding": "identity", "user-agent": "lutra", ...authorization, ...init.headers };
    return await fetch(address, { ...init, headers, ...(this.#signal === undefined ? {} : { signal: this.#signal }) });
  }

  async #refusal(response: Response, reference: HubReference): Promise<HubError> {
    await response.body?.cancel();
    const text = referenceText(reference);
    const code = response.headers.get("x-error-code") ?? "";
    if (response.status === 401 || response.status === 403) {
      const why = code === "GatedRepo" || response.status === 403
        ? "accept its conditions on its web page, and set HF_TOKEN to a token that may read it"
        : this.#token === undefined
        ? "it may be private: set HF_TOKEN to a token that may read it; or there is no such repository"
        : "HF_TOKEN is wrong or may not read it, or there is no such repository";
      return new HubError(`${text} is refused (${response.status}): ${why}`);
    }
    if (
      response.status === 404 && reference.file !== undefined && code !== "RepoNotFound" && code !== "RevisionNotFound"
    ) {
      const files = await this.files({ repo: reference.repo, revision: reference.revision }).catch(() => []);
      const close = suggestions(reference.file, files);
      if (close.length > 0) return new HubError(`there is no ${text}; there are\n${listed(close, reference)}`);
    }
    if (response.status === 404) {
      return new HubError(
        code === "RevisionNotFound"
          ? `${reference.repo} has no revision ${reference.revision}`
          : `there is no ${text} on ${this.#endpoint}`,
      );
    }
    return new HubError(`${this.#endpoint} answers ${response.status} to ${text}`);
  }
}

/** GGUF files, of split ones the first with the size of all. */
function modelsOf(files: readonly HubFile[]): HubFile[] {
  const sizes = new Map(files.map(({ path, size }) => [path, size]));
  return files.filter(({ path }) => path.endsWith(".gguf") && isFirst(path)).map(({ path }) => ({
    path,
    size: (splitNames(path) ?? [path]).reduce((sum, name) => sum + (sizes.get(name) ?? 0), 0),
  }));
}

/** All files of a GGUF, of which this is one. */
function wholeModel(reference: HubReference, file: string): (HubReference & { file: string })[] {
  const [first, ...others] = splitNames(file) ?? [file];
  return [...others, first!].map((file) => ({ ...reference, file }));
}

function listed(files: readonly HubFile[], reference: HubReference): string {
  return files.map(({ path, size }) => `  ${referenceText({ ...reference, file: path })}  (${bytes(size)})`).join("\n");
}

/** The files that a wrong name may have meant: GGUFs, those that share most with it first. */
function suggestions(name: string, files: readonly HubFile[]): HubFile[] {
  const pairs = (text: string) => {
    const plain = text.toLowerCase();
    return new Set(Array.from({ length: Math.max(0, plain.length - 1) }, (_, i) => plain.slice(i, i + 2)));
  };
  const wanted = pairs(name);
  const shared = (path: string) => [...pairs(path)].filter((pair) => wanted.has(pair)).length / (pairs(path).size || 1);
  return modelsOf(files).sort((a, b) => shared(b.path) - shared(a.path)).slice(0, 8);
}

async function isFile(path: string): Promise<boolean> {
  try {
    return (await Deno.stat(path)).isFile;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

async function writeAll(file: Deno.FsFile, chunk: Uint8Array, folder: string): Promise<void> {
  try {
    for (let at = 0; at < chunk.length;) at += await file.write(chunk.subarray(at));
  } catch (cause) {
    const full = (cause as { code?: string }).code === "ENOSPC";
    throw new HubError(
      full
        ? `${folder} is full: make room there and go on with the same command`
        : `${folder} cannot be written: ${(cause as Error).message}`,
      { cause },
    );
  }
}

async function hashOf(file: Deno.FsFile, { size, hash }: Target): Promise<string> {
  const digest = createHash(hash.kind === "sha256" ? "sha256" : "sha1");
  if (hash.kind === "git") digest.update(`blob ${size}\0`);
  await file.seek(0, Deno.SeekMode.Start);
  const buffer = new Uint8Array(1 << 20);
  for (let read = await file.read(buffer); read !== null; read = await file.read(buffer)) {
    digest.update(buffer.subarray(0, read));
  }
  return digest.digest("hex");
}

function freeBytes(folder: string): number {
  try {
    const { bavail, bsize } = statfsSync(folder);
    return bavail * bsize;
  } catch {
    return Infinity; // the file system does not say
  }
}
