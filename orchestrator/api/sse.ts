/** Milliseconds of silence after which a comment keeps the connection alive. */
const KEEP_ALIVE_MS = 15_000;

/**
 * A response of server-sent events. `produce` sends them; when the client leaves, `onLeave` is called.
 */
export function eventStream(
  produce: (send: (data: unknown) => void) => Promise<void>,
  onLeave: () => void,
  keepAliveMs: number = KEEP_ALIVE_MS,
): Response {
  const encoder = new TextEncoder();
  let timer: ReturnType<typeof setTimeout> | undefined;
  let open = true;
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      const write = (text: string) => {
        if (!open) return;
        controller.enqueue(encoder.encode(text));
        clearTimeout(timer);
        timer = setTimeout(() => write(": keep-alive\n\n"), keepAliveMs);
      };
      write(": ok\n\n"); // so that the headers leave now, however long the prompt takes
      produce((data) => write(`data: ${typeof data === "string" ? data : JSON.stringify(data)}\n\n`)).finally(() => {
        clearTimeout(timer);
        if (open) controller.close();
        open = false;
      });
    },
    cancel() {
      open = false;
      clearTimeout(timer);
      onLeave();
    },
  });
  return new Response(body, {
    headers: {
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-store",
      "x-accel-buffering": "no",
    },
  });
}
