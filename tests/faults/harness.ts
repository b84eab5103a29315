/**
 * A cluster of processes to break: a real nats-server, workers started as a user starts them, each in a network namespace of its own
 * (veth, 1 Gbit/s by tbf) where root and iproute2 allow it, and an engine in this process. Workers do not have the model's file:
 * they fetch their layers. Everything started here ends with it.
 *
 * @module
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { z } from "zod";
import { NatsBus } from "../../bus/mod.ts";
import type { NatsServer } from "../../bus/mod.ts";
import { loadModel } from "../../model/mod.ts";
import { Engine } from "../../orchestrator/mod.ts";
import type { EngineOptions } from "../../orchestrator/mod.ts";
import { ChunkFiles, hashFiles, WeightSource } from "../../weights/mod.ts";
import type { Manifest } from "../../weights/mod.ts";
import { repoPath } from "../data.ts";
import { nats } from "../nats.ts";

/** The bundled model. */
export const MODEL = repoPath("models", "lutra-books-6M-TQ2_0.gguf");

/** What the server tells of a client: its name, and its subscriptions. */
const connectionsSchema = z.object({
  connections: z.array(z.object({ name: z.string().default(""), subscriptions: z.number() })),
});

async function tool(command: string, ...args: string[]): Promise<void> {
  const { success, stderr } = await new Deno.Command(command, { args }).output();
  if (!success) throw new Error(`${command} ${args.join(" ")}: ${new TextDecoder().decode(stderr).trim()}`);
}

/** Whether the program that stands for a long cable can be built and run here. */
const RELAY = repoPath("kernels", "target", "release", "examples", "tun_relay");

/** Builds what {@linkcode DeviceOptions.delayMs} needs. */
export async function buildRelay(): Promise<void> {
  const manifest = repoPath("kernels", "Cargo.toml");
  await tool("cargo", "build", "--quiet", "--release", "--manifest-path", manifest, "--example", "tun_relay");
}

/**
 * A device's link to this namespace from one of its own: a pair of veth with 1 Gbit/s, or for a delay a pair of TUN devices with
 * a relay between them, as not every kernel has netem.
 */
class Link implements AsyncDisposable {
  /** Where the device reaches this side. */
  readonly host: string;
  readonly namespace: string;
  /** Links made: clusters of one process must not share them. */
  static #count = 0;
  readonly #outer: string;
  readonly #inner: string;
  #relay: Deno.ChildProcess | undefined;

  private constructor() {
    const index = Link.#count++;
    const tag = `${Deno.pid % 100_000}x${index}`;
    this.namespace = `lutra-${tag}`;
    this.#outer = `lt${tag}`;
    // Other processes' links must have other addresses: else a device's answers would go to another one.
    const subnet = (61 * Deno.pid + index) % (1 << 14);
    const address = (host: number) => `10.231.${subnet >> 6}.${4 * (subnet & 63) + host}`;
    this.host = address(1);
    this.#inner = address(2);
  }

  /** `undefined` where this user may not make one. */
  static async create(delayMs: number): Promise<Link | undefined> {
    if (Deno.build.os !== "linux" || Deno.uid() !== 0) return undefined;
    const link = new Link();
    try {
      await tool("ip", "netns", "add", link.namespace);
      if (delayMs > 0) await link.#connectRelay(delayMs);
      else {
        await tool("ip", "link", "add", link.#outer, "type", "veth", "peer", "name", "eth0", "netns", link.namespace);
      }
      await tool("ip", "addr", "add", `${link.host}/30`, "dev", link.#outer);
      await tool("ip", "link", "set", link.#outer, "up");
      await tool("ip", "-n", link.namespace, "addr", "add", `${link.#inner}/30`, "dev", "eth0");
      await tool("ip", "-n", link.namespace, "link", "set", "eth0", "up");
      await tool("ip", "-n", link.namespace, "link", "set", "lo", "up");
      if (delayMs > 0) return link;
      const shape = ["root", "tbf", "rate", "1gbit", "burst", "128k", "latency", "50ms"];
      await tool("tc", "qdisc", "add", "dev", link.#outer, ...shape);
      await tool("tc", "-n", link.namespace, "qdisc", "add", "dev", "eth0", ...shape);
      return link;
    } catch {
      await link[Symbol.asyncDispose]();
      return undefined;
    }
  }

  async #connectRelay(delayMs: number): Promise<void> {
    const inner = `${this.#outer}i`;
    const args = [this.#outer, inner, `${Math.round(1000 * delayMs)}`];
    this.#relay = new Deno.Command(RELAY, { args, stdin: "null", stdout: "piped" }).spawn();
    const reader = this.#relay.stdout.getReader();
    const { done } = await reader.read(); // `ready`
    await reader.cancel();
    if (done) throw new Error(`the relay ended with code ${(await this.#relay.status).code}`);
    await tool("ip", "link", "set", inner, "netns", this.namespace);
    await tool("ip", "-n", this.namespace, "link", "set", inner, "name", "eth0");
  }

  /** Pulls the cable, or plugs it in again: no FIN, no RST. */
  async set(state: "up" | "down"): Promise<void> {
    await tool("ip", "link", "set", this.#outer, state);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await tool("ip", "netns", "del", this.namespace).catch(() => {}); // a pair of veth goes with it
    if (this.#relay === undefined) return;
    try {
      this.#relay.kill("SIGKILL");
    } catch { /* it has ended */ }
    await this.#relay.status;
  }
}

/** A control group that bounds the processor time of what is in it: of version 2, or of version 1 where that has the controller. */
class CpuQuota implements AsyncDisposable {
  static readonly #period = 100_000;
  readonly #folder: string;
  readonly #version: 1 | 2;

  private constructor(folder: string, version: 1 | 2) {
    this.#folder = folder;
    this.#version = version;
  }

  /** `undefined` where this user may not make one. */
  static async create(name: string): Promise<CpuQuota | undefined> {
    const root = "/sys/fs/cgroup";
    try {
      const controllers = await Deno.readTextFile(`${root}/cgroup.controllers`).catch(() => "");
      if (/\bcpu\b/.test(controllers)) {
        await Deno.writeTextFile(`${root}/cgroup.subtree_control`, "+cpu");
        await Deno.mkdir(`${root}/${name}`);
        return new CpuQuota(`${root}/${name}`, 2);
      }
      await Deno.mkdir(`${root}/cpu/${name}`);
      return new CpuQuota(`${root}/cpu/${name}`, 1);
    } catch {
      return undefined;
    }
  }

  async set(pid: number, share: number | undefined): Promise<true> {
    const time = share === undefined ? undefined : Math.round(share * CpuQuota.#period);
    if (this.#version === 2) {
      await Deno.writeTextFile(`${this.#folder}/cpu.max`, `${time ?? "max"} ${CpuQuota.#period}`);
    } else await Deno.writeTextFile(`${this.#folder}/cpu.cfs_quota_us`, `${time ?? -1}`);
    await Deno.writeTextFile(`${this.#folder}/cgroup.procs`, `${pid}`);
    return true;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.#folder).catch(() => {}); // its processes have ended
  }
}

/** Whether control groups are this user's to make. */
export async function limitsCores(): Promise<boolean> {
  const quota = await CpuQuota.create(`lutra-${Deno.pid}-try`);
  await quota?.[Symbol.asyncDispose]();
  return quota !== undefined;
}

/** What devices are like. */
export interface DeviceOptions {
  /** The core that each is bound to, by its number. Default: all. */
  core?: (index: number) => number;
  /** Of every packet, one way. @default {0} */
  delayMs?: number;
  /** Memory to lend, in GB. @default {1} */
  memoryGB?: number;
  /** Whether they measure their speed; else they count as equally fast. @default {false} */
  measure?: boolean;
  /** Whether they may have a lane. @default {true} */
  lane?: boolean;
  /** The share of a core that each gets, by its number. Default: all of it. */
  quota?: (index: number) => number | undefined;
}

/** A worker's process. */
export class Device {
  readonly id: string;
  readonly link: Link | undefined;
  readonly #port: number;
  readonly #memoryGB: number;
  readonly #core: number | undefined;
  readonly #measure: boolean;
  readonly #lane: boolean;
  readonly #cache = mkdtempSync(join(tmpdir(), "lutra-device-"));
  #child: Deno.ChildProcess | undefined;
  #quota: CpuQuota | undefined;

  constructor(index: number, link: Link | undefined, port: number, options: DeviceOptions) {
    this.id = `w${index}`;
    this.link = link;
    this.#port = port;
    this.#memoryGB = options.memoryGB ?? 1;
    this.#core = options.core?.(index);
    this.#measure = options.measure ?? false;
    this.#lane = options.lane ?? true;
  }

  /** Starts it, or starts it again under the same name. */
  start(): void {
    const url = `nats://${this.link?.host ?? "127.0.0.1"}:${this.#port}`;
    const flags = [
      "--id",
      this.id,
      "--threads",
      "1",
      "--bandwidth",
      "10",
      "--memory",
      `${this.#memoryGB}`,
      "--no-cache",
      ...(this.#measure ? [] : ["--no-measure"]),
      ...(this.#lane ? [] : ["--no-lane"]),
    ];
    const run = ["run", "-q", "-P=worker", repoPath("mod.ts"), "worker", "--nats", url, ...flags, "--drain", "5"];
    const [command, ...args] = [
      ...(this.link === undefined ? [] : ["ip", "netns", "exec", this.link.namespace]),
      ...(this.#core === undefined ? [] : ["taskset", "-c", `${this.#core}`]),
      Deno.execPath(),
      ...run,
    ];
    this.#child = new Deno.Command(command!, {
      args,
      cwd: repoPath(),
      env: { LUTRA_CACHE: this.#cache },
      stdin: "null",
      stdout: "null",
      stderr: Deno.env.has("LUTRA_FAULTS_LOG") ? "inherit" : "null",
    }).spawn();
  }

  /** `ip netns exec` and `taskset` become the worker, so that the child's number is the worker's. */
  kill(signal: Deno.Signal): void {
    try {
      this.#child?.kill(signal);
    } catch { /* it has ended */ }
  }

  /** The process's number. */
  get pid(): number {
    return this.#child!.pid;
  }

  /** Bounds the process to a share of a core, or lifts the bound. False where control groups are not this user's to make. */
  async limit(share: number | undefined): Promise<boolean> {
    this.#quota ??= await CpuQuota.create(`lutra-${Deno.pid}-${this.id}`);
    return this.#child !== undefined && await this.#quota?.set(this.#child.pid, share) === true;
  }

  /** Deletes the weights that it fetched: who is to load them next fetches them again. */
  forget(): void {
    rmSync(join(this.#cache, "fetched"), { recursive: true, force: true });
  }

  /** Resolves with its exit code. */
  async ended(): Promise<number> {
    return (await this.#child!.status).code;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill("SIGKILL"); // ends a stopped process too
    await this.#child?.status;
    rmSync(this.#cache, { recursive: true });
    await this.#quota?.[Symbol.asyncDispose]();
    await this.link?.[Symbol.asyncDispose]();
  }
}

/** @param monitor The port on which the server tells of its connections. */
function startServer(port: number, monitor: number): Promise<NatsServer> {
  return nats.start({ host: "0.0.0.0", port, config: `http: "127.0.0.1:${monitor}"` });
}

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** What a cluster is made of. */
export class FaultCluster implements AsyncDisposable {
  server: NatsServer;
  readonly devices: Device[] = [];
  bus!: NatsBus;
  engine!: Engine;
  /** What the deployment told, with the time. */
  readonly events: { at: number; text: string }[] = [];
  /** Milliseconds that the source of weights takes for a chunk. */
  chunkMs = 0;
  readonly #cache = mkdtempSync(join(tmpdir(), "lutra-source-"));
  #manifest!: Manifest;
  #source: WeightSource | undefined;
  #sourceBus: NatsBus | undefined;

  readonly #monitor: number;
  /** Of the engine, whenever it is opened. */
  readonly #options: Partial<EngineOptions>;

  private constructor(server: NatsServer, monitor: number, options: Partial<EngineOptions>) {
    this.server = server;
    this.#monitor = monitor;
    this.#options = options;
  }

  static async start(
    count: number,
    options: Partial<EngineOptions> = {},
    devices: DeviceOptions = {},
  ): Promise<FaultCluster> {
    const monitor = freePort();
    const cluster = new FaultCluster(await startServer(0, monitor), monitor, options);
    try {
      await cluster.#offer();
      for (let i = 0; i < count; i++) {
        const device = new Device(i, await Link.create(devices.delayMs ?? 0), cluster.server.port, devices);
        cluster.devices.push(device);
        device.start();
        const quota = devices.quota?.(i);
        if (quota !== undefined && !await device.limit(quota)) throw new Error("control groups cannot be made here");
      }
      await cluster.open({ workers: count });
      return cluster;
    } catch (error) {
      await cluster[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Gives chunks of the bundled model, on a connection of its own: the orchestrator may end. */
  async #offer(): Promise<void> {
    this.#manifest = await hashFiles([MODEL]);
    const file = await ChunkFiles.open([MODEL], this.#manifest, this.#cache, "own");
    file.trust();
    const read = file.read.bind(file);
    file.read = async (chunk) => {
      await new Promise((resolve) => setTimeout(resolve, this.chunkMs));
      return await read(chunk);
    };
    const bus = this.#sourceBus = await NatsBus.connect({
      servers: `127.0.0.1:${this.server.port}`,
      onError: () => {},
    });
    this.#source = new WeightSource({ bus, cluster: "lutra", id: "source", file });
  }

  /** Kills the server and starts another at the same port. */
  async restartServer(): Promise<void> {
    const { port } = this.server;
    this.server.kill("SIGKILL");
    await this.server.stop();
    this.server = await startServer(port, this.#monitor);
  }

  /** Opens the orchestrator's side; what is told here goes before what was told at the start. */
  async open(options: Partial<EngineOptions> = {}): Promise<void> {
    const { root, files } = this.#manifest;
    // The bundled model is under a path that no worker has.
    const bundled = async () => ({
      model: { ...await loadModel(MODEL), path: "/nowhere.gguf" },
      weights: { root, files: [...files] },
    });
    const { model, ...rest } = { ...this.#options, ...options };
    this.bus = await NatsBus.connect({ servers: `127.0.0.1:${this.server.port}`, onError: () => {} });
    this.engine = await Engine.start({
      bus: this.bus,
      ...(model === undefined ? await bundled() : { model }),
      cluster: "lutra",
      context: 512,
      kvTokens: 4096,
      workerTimeoutMs: 60_000,
      lostMs: 1600,
      recoveryTimeoutMs: 20_000,
      unload: false,
      log: (text) => {
        this.events.push({ at: performance.now(), text });
        if (Deno.env.has("LUTRA_FAULTS_LOG")) console.error(text);
      },
      ...rest,
    });
  }

  /** Ends the orchestrator's side without a word to the workers. */
  async shut(): Promise<void> {
    await this.bus?.close(); // first, so that nobody hears of it
    await this.engine?.close();
  }

  /** Subscriptions of every client, by its name. */
  async subscriptions(): Promise<Map<string, number>> {
    const response = await fetch(`http://127.0.0.1:${this.#monitor}/connz`);
    const { connections } = connectionsSchema.parse(await response.json());
    return new Map(connections.map(({ name, subscriptions }) => [name, subscriptions]));
  }

  /** The device that holds a stage. */
  holder(stage: number): Device {
    const { worker } = this.engine.stats().stages[stage]!;
    return this.devices.find((device) => device.id === worker)!;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.shut();
    await this.#source?.close();
    await this.#sourceBus?.close();
    rmSync(this.#cache, { recursive: true });
    for (const device of this.devices) await device[Symbol.asyncDispose]();
    await this.server.stop();
  }
}
