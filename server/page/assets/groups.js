import { html } from "./html.js";

export function Groups() {
  return html``;
}
