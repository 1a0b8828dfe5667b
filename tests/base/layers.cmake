# Includes may only point left; and the check itself finds what it should.
add_test(NAME base.layers COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/layers.sh ${CMAKE_SOURCE_DIR})
add_test(NAME base.layers_self_test COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/layers.sh --self-test)
