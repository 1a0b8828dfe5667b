# docs/config.md must be what the configuration table gives.
add_executable(config_docs ${CMAKE_CURRENT_SOURCE_DIR}/base/config_docs.c)
target_link_libraries(config_docs PRIVATE moe_base)
add_test(NAME base.config_docs COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/base/config_docs.sh
  $<TARGET_FILE:config_docs> ${CMAKE_SOURCE_DIR}/docs/config.md)
