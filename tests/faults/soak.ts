/**
 * `deno task soak --minutes N`: breaks a cluster at random for long, and then looks whether memory, subscriptions or sequences have
 * grown. Between two faults all is mended and nothing runs; that is when it counts.
 */
import { Command } from "commander";
import { integer } from "../../cli/options.ts";
import { startLocalCluster } from "../../cli/local_cluster.ts";
import { FaultCluster, MODEL } from "./harness.ts";
import { FAULTS, gathered, received, requests, tokens } from "./matrix.ts";

const { minutes, pause, json } = new Command("soak")
  .description("break a cluster at random for long, and see whether anything leaks")
  .option("--minutes <n>", "how long", integer(1), 30)
  .option("--pause <ms>", "milliseconds without work between two faults", integer(0), 3000)
  .option("--json", "print JSON lines")
  .parse(Deno.args, { from: "user" }).opts<{ minutes: number; pause: number; json?: boolean }>();

const DEVICES = 4;
const PROMPT_TOKENS = 12;
/** Resident memory may grow so much from the second third to the last: the share and bytes that allocators take and give. */
const GROWTH = 0.1;
const GROWTH_BYTES = 30e6;
/** Faults after which every process is the same as before, and those that start a worker again. */
const PIPELINE = Object.entries(FAULTS).filter(([, { replicas }]) => replicas !== true);
const LASTING = PIPELINE.filter(([name]) => !/SIGKILL|SIGTERM|losses|rejoins/.test(name));
const RESTARTING = PIPELINE.filter(([name]) => /SIGKILL of|SIGTERM|rejoins/.test(name));

/** What is counted while nothing runs. */
interface Count {
  minute: number;
  fault: string;
  /** Bytes in memory: of this process, which is orchestrator and client, and of each worker, by its process's number. */
  rss: Record<string, number>;
  subscriptions: Record<string, number>;
  /** In the KV caches of all stages, without those that are kept for requests that begin alike. */
  sequences: number;
}

async function count(cluster: FaultCluster, fault: string, minute: number): Promise<Count> {
  (globalThis as { gc?: () => void }).gc?.();
  const rss: Record<string, number> = { orchestrator: Deno.memoryUsage().rss };
  for (const { id, pid } of cluster.devices) {
    const kilobytes = /VmRSS:\s+(\d+)/.exec(await Deno.readTextFile(`/proc/${pid}/status`))?.[1];
    rss[`${id} ${pid}`] = 1024 * Number(kilobytes);
  }
  const stages = await cluster.engine.query();
  return {
    minute,
    fault,
    rss,
    subscriptions: Object.fromEntries(await cluster.subscriptions()),
    sequences: stages.reduce((sum, { stats }) => sum + stats.sequences - cluster.engine.stats().kept, 0),
  };
}

const middle = (values: readonly number[]) => [...values].sort((a, b) => a - b)[values.length >> 1]!;

/** What grew from the second third to the last, in words. */
function leaks(counts: readonly Count[]): string[] {
  const found: string[] = [];
  const third = Math.floor(counts.length / 3);
  const [before, after] = [counts.slice(third, 2 * third), counts.slice(2 * third)];
  for (const name of Object.keys(counts.at(-1)!.rss)) {
    const [a, b] = [before, after].map((part) => part.flatMap(({ rss }) => rss[name] ?? []));
    if (a!.length < 3 || b!.length < 3) continue; // a process that was started again
    const [from, to] = [middle(a!), middle(b!)];
    if (to > (1 + GROWTH) * from + GROWTH_BYTES) {
      found.push(`memory of ${name}: ${(from / 1e6).toFixed(0)} to ${(to / 1e6).toFixed(0)} MB`);
    }
  }
  // How many there are depends on who holds a stage and who stands by: what grows passes what it has ever been.
  const earlier = counts.slice(0, 2 * third);
  const most = (part: readonly Count[], of: (count: Count) => number) => Math.max(...part.map(of));
  for (const name of Object.keys(counts.at(-1)!.subscriptions)) {
    const [from, to] = [earlier, after].map((part) => most(part, ({ subscriptions }) => subscriptions[name] ?? 0));
    if (to! > from!) found.push(`subscriptions of ${name || "others"}: ${from} to ${to}`);
  }
  const [from, to] = [before, after].map((part) => most(part, ({ sequences }) => sequences));
  if (to! > from!) found.push(`sequences: ${from} to ${to}`);
  return found;
}

const wanted = requests(PROMPT_TOKENS);
let expected: number[][];
{
  await using one = await startLocalCluster(MODEL, { threads: 1, context: 512, kvTokens: 4096 });
  expected = await Promise.all(wanted.map((request) => tokens(one.engine, request)));
}
const counts: Count[] = [];
let wrong = 0;
{
  await using cluster = await FaultCluster.start(DEVICES, { shards: 2 });
  const begin = performance.now();
  const end = begin + 60_000 * minutes;
  for (let round = 0; performance.now() < end; round++) {
    // Mostly such faults as leave the processes alive, so that theirs is a long life.
    const choice = round % 5 === 4 ? RESTARTING : LASTING;
    const [name, fault] = choice[Math.floor(Math.random() * choice.length)]!;
    if (fault.needs === "namespaces" && cluster.devices[0]!.link === undefined) continue;
    let struck: Promise<void> | undefined;
    let seen = 0;
    const at = 20 + Math.floor(Math.random() * 400);
    const got = await Promise.all(wanted.map((request) =>
      received(cluster, request, () => {
        if (++seen === at) struck = Promise.resolve(fault.act(cluster));
      })
    ));
    await struck;
    wrong += got.flatMap((ids, n) => expected[n]!.filter((id, i) => id !== ids[i])).length;
    try {
      await fault.mend?.(cluster);
      await gathered(cluster, DEVICES);
      await new Promise((resolve) => setTimeout(resolve, pause));
      await gathered(cluster, DEVICES);
    } catch (cause) {
      const told = cluster.events.slice(-8).map(({ text }) => text).join("\n");
      throw new Error(`not whole again after ${name}, number ${round}:\n${told}`, { cause });
    }
    const counted = await count(cluster, name, (performance.now() - begin) / 60_000);
    counts.push(counted);
    if (json === true) console.log(JSON.stringify(counted));
  }
}
const found = leaks(counts);
const [first, last] = [counts[Math.floor(counts.length / 3)]!, counts.at(-1)!];
const result = { minutes, faults: counts.length, wrong_tokens: wrong, leaks: found, first, last };
if (json === true) console.log(JSON.stringify(result));
else {
  console.log(`${counts.length} faults in ${minutes} minutes, ${wrong} wrong tokens`);
  console.log(found.length === 0 ? "nothing leaks" : `leaks: ${found.join("; ")}`);
}
Deno.exit(found.length > 0 || wrong > 0 ? 1 : 0);
